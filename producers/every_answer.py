"""What every request has in common, whoever answers it: an id, security headers, a line in the access log.

On the framework's way it is a pure ASGI wrapper around everything else, the last resort for errors included.
`producers.front` does the same with the same functions.
"""

from __future__ import annotations

import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from producers.access_log import AccessLog
from producers.request_ids import HEADER, request_id
from producers.security_headers import RawHeaders, completed

_REQUEST_ID: Final = HEADER.lower().encode()


class EveryAnswer:
    """Names the request, completes the headers of its answer, and logs it if there is a log.

    The id is in every log line of the request's own task (structlog's `request_id`). A task that works for several
    requests is started in `shared.logs.nobodys_context`, or it would go by the name of the one that started it.
    """

    def __init__(self, app: ASGIApp, access_log: AccessLog | None) -> None:
        self._app = app
        self._log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        name = named(scope)
        status: int | None = None
        size = 0

        async def sender(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = whole_head(message.get("headers", ()), name)
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, sender)
        finally:
            if self._log is not None:
                note(self._log, scope, status, size, began)


def named(scope: Scope) -> str:
    """The id of this request, which is in the log lines of its task from now on."""
    name = request_id(scope)
    bind_contextvars(request_id=name)
    return name


def whole_head(headers: RawHeaders, name: str) -> list[tuple[bytes, bytes]]:
    """The fields of an answer, and those that every answer has; `name` is the request's id."""
    head = completed(headers)
    head.append((_REQUEST_ID, name.encode()))
    return head


def note(log: AccessLog, scope: Scope, status: int | None, size: int, began: float) -> None:
    """Log a request that has ended. `status` is None, and `size` (bytes of the body) 0, if no answer was begun."""
    # The server may have answered in our place, when the request did not end as one.
    refused = scope["state"].get("refused")
    if refused or scope["state"].get("left"):
        # Or the client had left by then, and nothing of the answer was sent.
        status, size = refused, 0
    sent = 0 if scope["method"] == "HEAD" else size
    log.add(scope, status, time.perf_counter() - began, sent)
