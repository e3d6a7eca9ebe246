"""What a request body may be, checked before any handler sees it: JSON, and not large.

Every request is looked at so: one without a body costs a look at its headers.
"""

from __future__ import annotations

from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from producers.problems import MALFORMED, NOT_JSON, TOO_LARGE, Problem, response

#: Bytes of a body. The longest valid purchase has about 3 KiB, even with every character escaped; an item has less.
LARGEST_BODY: Final = 16 * 1024

_JSON: Final = b"application/json"


class BodyLimits:
    """Answers 413 `too-large` and 415 `not-json` before the application is asked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            receive = await within_limits(scope, receive)
        except ClientDisconnect:
            return
        except Problem as problem:
            await response(problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def within_limits(scope: Scope, receive: Receive) -> Receive:
    """From where the body of this request is to be read; it is within the limits then.

    Raises Problem `malformed`, `too-large` or `not-json`, and ClientDisconnect as `whole_body` does.
    """
    content_type = b""
    length: bytes | None = None
    chunked = False
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = value
        elif name == b"content-type":
            content_type = value
        elif name == b"transfer-encoding":
            chunked = True
    if chunked:
        # Its size is known only at its end, so it is read here. One that announces its size is held to it by the
        # server.
        body = await whole_body(receive)
        receive = _Replay(body, receive)
        has_body = bool(body)
    elif length is None:
        has_body = False
    else:
        if not length.isdigit():
            raise Problem(MALFORMED, "Content-Length is not a number.")
        length = length.lstrip(b"0")
        # Digits are counted first: turning a number of thousands of digits into an int is work for nothing.
        if len(length) > 9 or int(length or b"0") > LARGEST_BODY:
            raise _too_large()
        has_body = bool(length)
    if has_body and content_type != _JSON and content_type.partition(b";")[0].strip().lower() != _JSON:
        detail = "The content type is not application/json." if content_type else "The body has no content type."
        raise Problem(NOT_JSON, detail)
    return receive


def _too_large() -> Problem:
    return Problem(TOO_LARGE, f"The body has more than {LARGEST_BODY:,} bytes.")


async def whole_body(receive: Receive) -> bytes:
    """The body of a request: what `Request.body` gives, without the asynchronous generator, which costs ten times this.

    Raises Problem `too-large`, and ClientDisconnect when the client hangs up before its end: half a body is not a
    request.
    """
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        chunk: bytes = message.get("body", b"")
        body = body + chunk if body else chunk
        if len(body) > LARGEST_BODY:
            raise _too_large()
        if not message.get("more_body", False):
            return body


class _Replay:
    """Hands out a body that was read already, and then whatever else comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
