"""HEAD and OPTIONS on every path (RFC 9110): HEAD is GET without its body, OPTIONS says which methods there are."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

#: Every method we serve, and PATCH, which nobody does: what is looked for among the routes.
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Methods:
    """Answers OPTIONS with 204 and `Allow`, and lets GET routes that do not know HEAD answer it as well.

    Neither needs a key: which methods a path has is written under /docs. Other requests cost one comparison.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("HEAD", "OPTIONS"):
            methods = methods_of(scope)
            if scope["method"] == "HEAD" and "GET" in methods and "HEAD" not in methods:
                # A copy: the server still sees a HEAD, and sends no body.
                scope = {**scope, "method": "GET"}
            elif scope["method"] == "OPTIONS" and methods:
                await Response(status_code=204, headers={"Allow": allow(methods)})(scope, receive, send)
                return
        await self._app(scope, receive, send)


def methods_of(scope: Scope) -> frozenset[str]:
    """The methods that the routes take at the path of this request; empty where there is nothing."""
    return frozenset(
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in scope["app"].router.routes)
    )


def allow(methods: frozenset[str]) -> str:
    """The value of the header `Allow` at a path with these methods: with those that every path has."""
    everywhere = {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    return ", ".join(sorted(methods | everywhere))
