"""`/docs`: Swagger UI, served by this process alone. `/openapi.json` is the framework's, completed by `openapi`.

The script and the stylesheet come from the package fastapi-offline, of which only these two files are used. A content
security policy makes the browser refuse whatever they might want from elsewhere.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Final

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from producers.problems import NOT_FOUND, Problem

#: The files of the page and their types; nothing else of that package is served.
_ASSETS: Final = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}

_POLICY: Final = (
    # The page starts Swagger UI by an inline script, and Swagger UI sets styles on its elements.
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


async def docs(request: Request) -> Response:
    """`GET /docs`: the page."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=f"{request.app.title} API",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={
            "validatorUrl": None,  # its default asks a validator on the internet
            "displayRequestDuration": True,
            "persistAuthorization": False,  # an API key does not belong into the browser's storage
            "tryItOutEnabled": True,
        },
    )
    page.headers["Content-Security-Policy"] = _POLICY
    return page


async def asset(request: Request) -> Response:
    """`GET /docs/<file>`: one of the page's two files. Raises Problem (404) for any other name."""
    name = request.path_params["name"]
    if name not in _ASSETS:
        raise Problem(NOT_FOUND)
    return Response(_asset(name), media_type=_ASSETS[name], headers={"Cache-Control": "public, max-age=3600"})


@cache
def _asset(name: str) -> bytes:
    return files("fastapi_offline").joinpath("static", name).read_bytes()


routes: Final = (Route("/docs", docs), Route("/docs/{name}", asset))
