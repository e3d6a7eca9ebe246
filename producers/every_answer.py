"""What every request has in common, whoever answers it: an id, security headers, a line in the access log.

A pure ASGI wrapper around everything else of the application, the last resort for errors included.
"""

from __future__ import annotations

import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from producers.access_log import AccessLog
from producers.request_ids import HEADER, request_id
from producers.security_headers import completed

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
        name = request_id(scope)
        bind_contextvars(request_id=name)
        status: int | None = None
        size = 0

        async def sender(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*completed(message.get("headers", ())), (_REQUEST_ID, name.encode())]
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, sender)
        finally:
            if self._log is not None:
                # The server may have answered in our place, when the request did not end as one.
                refused = scope["state"].get("refused")
                if refused or scope["state"].get("left"):
                    # Or the client had left by then, and nothing of the answer was sent.
                    status, size = refused, 0
                sent = 0 if scope["method"] == "HEAD" else size
                self._log.add(scope, status, time.perf_counter() - began, sent)
