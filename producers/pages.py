"""The pages behind `type`: what each kind of error means and what to do, for the person who reads the answer.

Plain HTML in one piece: nothing is loaded from elsewhere, and no script runs.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from typing import Final

from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from producers.problems import CATALOGUE, NOT_FOUND, Problem, ProblemType

_STYLE: Final = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #5b6570; --line: #d9dee3; --ground: #fff; --link: #0a58ca }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --soft: #9aa5b1; --line: #343b43; --ground: #15181c; --link: #7ab0ff }
}
body { margin: 0; background: var(--ground); color: var(--text); font: 1rem/1.6 system-ui, sans-serif }
main { max-width: 42rem; margin: 0 auto; padding: 3rem 1.25rem }
h1 { font-size: 1.75rem; line-height: 1.25; margin: .25rem 0 2rem }
h2 { font-size: 1rem; margin: 1.75rem 0 .25rem }
p { margin: 0 }
a { color: var(--link) }
code { font: .9em ui-monospace, monospace }
.status { color: var(--soft) }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft) }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .5rem 1rem .5rem 0; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: normal }
"""

#: The one style that a page may have, as a policy names it.
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

_HEADERS: Final = {
    "Content-Security-Policy": f"default-src 'none'; img-src data:; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "public, max-age=3600",
}


async def problem_list(request: Request) -> HTMLResponse:
    """`GET /problems`: every kind of error, in the order of their statuses."""
    rows = "\n".join(
        f'<tr><td>{kind.status}</td><td><a href="{escape(kind.type)}"><code>{escape(kind.slug)}</code></a></td>'
        f"<td>{escape(kind.title)}</td></tr>"
        for kind in CATALOGUE.values()
    )
    return _page(
        "Problems",
        f"""<h1>Problems</h1>
<p>Every error of this API is a JSON object whose <code>type</code> is one of these.</p>
<h2 id="list">All of them</h2>
<table aria-labelledby="list">
<thead><tr><th scope="col">Status</th><th scope="col">Type</th><th scope="col">Title</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<footer><a href="/docs">API documentation</a></footer>""",
    )


async def problem_page(request: Request) -> HTMLResponse:
    """`GET /problems/<slug>`: one kind of error. Raises Problem (404) for a slug that no error has."""
    kind = CATALOGUE.get(request.path_params["slug"])
    if kind is None:
        raise Problem(NOT_FOUND, "No kind of error has this name. GET /problems lists them all.")
    return _page(kind.title, _describe(kind))


def _describe(kind: ProblemType) -> str:
    return f"""<p class="status">HTTP {kind.status} · <code>{escape(kind.type)}</code></p>
<h1>{escape(kind.title)}</h1>
<h2>What it means</h2>
<p>{escape(kind.meaning)}</p>
<h2>What to do</h2>
<p>{escape(kind.what_to_do)}</p>
<footer><a href="/problems">All problems</a> · <a href="/docs">API documentation</a></footer>"""


def _page(title: str, main: str) -> HTMLResponse:
    return HTMLResponse(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · Fairlane</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
{main}
</main>
</body>
</html>
""",
        headers=_HEADERS,
    )


routes: Final = (Route("/problems", problem_list), Route("/problems/{slug}", problem_page))
