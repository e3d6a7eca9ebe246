"""The way in: requests of the crowd's routes go straight to their handlers, all others through the framework.

In a sale nearly every request is a purchase, or a question how one stands. The framework's own layers (telemetry, exit
stacks, several routers and exception handlers, one inside the other) would cost such a request more than its handler
does. What every request has in common is the same on both ways, and in the same modules: `EveryAnswer`, `LastResort`,
`BodyLimits`, `Answers`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from producers.access_log import AccessLog
from producers.every_answer import EveryAnswer
from producers.failures import Answers, LastResort
from producers.limits import BodyLimits


class CrowdRoute:
    """A route that a crowd asks for by this method, and what goes around its handler alone, outermost first.

    The route stands among those of the framework as well, for every other method and for those who look routes up.
    """

    def __init__(self, route: Route, method: str, *around: Callable[[ASGIApp], ASGIApp]) -> None:
        if route.param_convertors and any(kind.regex != "[^/]+" for kind in route.param_convertors.values()):
            raise ValueError(f"{route.path}: only plain values can be taken out of a path here")
        self.endpoint = route.endpoint
        self.method = method
        self.around = around
        self._pattern = route.path_regex

    def values(self, scope: Scope) -> dict[str, str] | None:
        """The values in the path of this request; None if it is not for this route."""
        if scope["method"] != self.method or (found := self._pattern.match(scope["path"])) is None:
            return None
        return found.groupdict()


class Front:
    """The application as the server calls it."""

    def __init__(
        self, app: FastAPI, routes: Sequence[CrowdRoute], answers: Answers, access_log: AccessLog | None
    ) -> None:
        self._app = app
        self._routes = [(route, _stack(route, answers, access_log)) for route in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Mounted below another path, the framework has to take that off.
        if scope["type"] == "http" and not scope.get("root_path"):
            for route, stack in self._routes:
                if (values := route.values(scope)) is not None:
                    scope["app"] = self._app
                    scope["path_params"] = values
                    await stack(scope, receive, send)
                    return
        await self._app(scope, receive, send)


def _stack(route: CrowdRoute, answers: Answers, access_log: AccessLog | None) -> ASGIApp:
    """All that lies around the handler of this route, in the order it has in the framework."""
    app: ASGIApp = _Handler(route.endpoint, answers)
    for around in reversed(route.around):
        app = around(app)
    return EveryAnswer(LastResort(BodyLimits(app)), access_log)


class _Handler:
    """Calls a handler; what it raises becomes an answer if somebody foresaw it."""

    def __init__(self, endpoint: Callable[[Request], Awaitable[Response]], answers: Answers) -> None:
        self._endpoint = endpoint
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # An error while the answer is being sent is nobody's to answer: LastResort breaks the connection off.
        response: Response | None
        try:
            response = await self._endpoint(Request(scope, receive, send))
        except Exception as error:
            response = self._answers.to(error, scope)
            if response is None:
                raise
        await response(scope, receive, send)
