"""A purchase as a stream of server-sent events (text/event-stream): one per change, until it is final.

The stream keeps no queue: it looks at the purchase, sends what is new, and looks again once the client has taken that.
So a slow reader skips what was between, and costs one event at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from producers.reading import Reader, Reading
from producers.waiting import Hub, until_gone
from shared.errors import UnavailableError

#: Milliseconds until a client connects again after the stream broke. Long enough for all the clients of a process that
#: stopped to be spread over the others as they come.
_RETRY: Final = b"retry: 2000\n\n"
#: Seconds of silence after which a comment is sent: proxies take a connection for dead after 60 s as a rule, some
#: after 30.
_SAY_AFTER: Final = 15.0
_STILL_HERE: Final = b": still here\n\n"
#: Seconds after which a stream ends all the same, and its client connects again: so that keys that were taken away do
#: not watch for ever, and clients spread over new processes.
_LONGEST: Final = 600.0

_HEADERS: Final[Mapping[str, str]] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    # nginx, and what speaks its language, would else collect events until a buffer is full.
    "X-Accel-Buffering": "no",
}


class EventStream(Response):
    """The stream of one purchase. `first` is the purchase as it was found when the request came.

    `name` is the type of its events and `json` makes their data. `id` is the purchase's revision.
    """

    def __init__(self, hub: Hub, reader: Reader, first: Reading, name: str, json: Callable[[Reading], bytes]) -> None:
        super().__init__(headers=dict(_HEADERS))
        # The length of a stream is not known.
        del self.headers["Content-Length"]
        self._hub = hub
        self._reader = reader
        self._latest = first
        self._name = name.encode()
        self._json = json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] != "HEAD":
            await self._tell(receive, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + _LONGEST
        told = None
        silent_since = loop.time()
        message = _RETRY
        with self._hub.bell(self._latest.record.id) as bell, until_gone(receive, bell):
            while True:
                await self._look()
                state = (self._latest.record.rev, self._latest.position)
                if state != told:
                    told = state
                    message += self._event()
                elif loop.time() >= silent_since + _SAY_AFTER:
                    message += _STILL_HERE
                if message:
                    await send({"type": "http.response.body", "body": message, "more_body": True})
                    message, silent_since = b"", loop.time()
                if self._latest.record.final or bell.over or loop.time() >= end:
                    return
                await bell.heard(min(silent_since + _SAY_AFTER, end))

    async def _look(self) -> None:
        record = self._latest.record
        try:
            self._latest = await self._reader.read(record.id, at_least=record.rev) or self._latest
        except UnavailableError:
            # The client keeps what it knows, and the next look tells it what came of it.
            return

    def _event(self) -> bytes:
        return b"id: %d\nevent: %b\ndata: %b\n\n" % (self._latest.record.rev, self._name, self._json(self._latest))
