"""`/docs`: Swagger UI, served by this process alone. `/openapi.json` is the framework's, completed by `openapi`.

The script and the stylesheet come from the package fastapi-offline, of which only these two files are used. A content
security policy makes the browser refuse whatever they might want from elsewhere.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from producers.problems import NOT_FOUND, Problem

_KEPT: Final = {"Cache-Control": "public, max-age=3600"}
#: The files of that package and their types; nothing else of it is served.
_ASSETS: Final = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}

_POLICY: Final = (
    # Swagger UI sets styles on its elements. No script runs that is not one of our files.
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fairlane API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START: Final = "start.js"
#: A file, since a script in the page itself would need a policy that lets any script in the page run.
_START_SCRIPT: Final = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  layout: "BaseLayout",
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
  deepLinking: true,
  showExtensions: true,
  showCommonExtensions: true,
  validatorUrl: null, // its default asks a validator on the internet
  displayRequestDuration: true,
  persistAuthorization: false, // an API key does not belong into the browser's storage
  tryItOutEnabled: true,
});
"""


async def docs(request: Request) -> Response:
    """`GET /docs`: the page."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


async def asset(request: Request) -> Response:
    """`GET /docs/<file>`: one of the page's files. Raises Problem (404) for any other name."""
    name = request.path_params["name"]
    if name == _START:
        return Response(_START_SCRIPT, media_type="text/javascript", headers=_KEPT)
    if name not in _ASSETS:
        raise Problem(NOT_FOUND)
    return Response(_asset(name), media_type=_ASSETS[name], headers=_KEPT)


@cache
def _asset(name: str) -> bytes:
    return files("fastapi_offline").joinpath("static", name).read_bytes()


routes: Final = (Route("/docs", docs), Route("/docs/{name}", asset))
