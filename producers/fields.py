"""Fields of an answer that depend on its request, such as those of `producers.cors` and `producers.rates`."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Adds to the fields of the answer to this request, whatever the answer is.
AddFields = Callable[[Scope, MutableHeaders], None]


class Fields:
    """Has fields added to every answer of the application inside, problems included."""

    def __init__(self, app: ASGIApp, add: AddFields) -> None:
        self._app = app
        self._add = add

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add(scope, MutableHeaders(scope=message))
            await send(message)

        await self._app(scope, receive, sender)
