"""The way in: requests of the crowd's routes go straight to their handlers, all others through the framework.

In a sale nearly every request is a purchase, or a question how one stands. The framework's own layers (telemetry, exit
stacks, several routers and exception handlers, one inside the other) would cost such a request more than its handler
does. What every request has in common is the same on both ways, and from the same modules: its name and its line in the
log (`producers.every_answer`), the limits of its body (`producers.limits`), and what becomes of an error
(`producers.failures`). Here it is one function, as each layer of its own is felt by a crowd.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from producers.access_log import AccessLog
from producers.every_answer import named, note, whole_head
from producers.failures import Answers, broken_off
from producers.fields import AddFields
from producers.limits import within_limits


class CrowdRoute:
    """A route that a crowd asks for by this method, and what adds fields to its answers. They are made whole.

    The route stands among those of the framework as well, for every other method and for those who look routes up.
    """

    def __init__(self, route: Route, method: str, *adding: AddFields) -> None:
        if route.param_convertors and any(kind.regex != "[^/]+" for kind in route.param_convertors.values()):
            raise ValueError(f"{route.path}: only plain values can be taken out of a path here")
        self.endpoint = route.endpoint
        self.method = method
        self.adding = adding
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
        self._routes = routes
        self._answers = answers
        self._log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Mounted below another path, the framework has to take that off.
        if scope["type"] == "http" and not scope.get("root_path"):
            for route in self._routes:
                if (values := route.values(scope)) is not None:
                    scope["app"] = self._app
                    scope["path_params"] = values
                    await self._serve(route, scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _serve(self, route: CrowdRoute, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, from its name to its line in the log."""
        began = time.perf_counter()
        name = named(scope)
        response: Response | None = None
        try:
            try:
                response = await route.endpoint(Request(scope, await within_limits(scope, receive), send))
            except ClientDisconnect:
                # It hung up before its request was whole: nothing was begun, and nobody is left to answer.
                return
            except Exception as error:  # noqa: BLE001  # whatever it is, the client gets an answer
                response = self._answers.to(error, scope)
            try:
                for add_fields in route.adding:
                    add_fields(scope, MutableHeaders(raw=response.raw_headers))
                response.raw_headers = whole_head(response.raw_headers, name)
                await response(scope, receive, send)
            except Exception as error:  # noqa: BLE001  # half an answer may be out
                raise broken_off(scope, error) from None
        finally:
            if self._log is not None:
                status, size = (response.status_code, len(response.body)) if response is not None else (None, 0)
                note(self._log, scope, status, size, began)
