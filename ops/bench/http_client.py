"""An HTTP/1.1 client that costs the machine little: what it spends is missing to those who are measured.

It knows what our own servers answer and no more: a status line, a Content-Length, a body. No chunks, no redirects.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
#: Where the status stands in `HTTP/1.1 202 Accepted`.
_STATUS = slice(9, 12)


class Answer(NamedTuple):
    """What came back. `head` is the status line and the fields, without the empty line."""

    status: int
    head: bytes
    body: bytes


OnAnswer = Callable[[Answer], None]


class Client:
    """Requests over at most `connections` kept connections; what does not find a free one waits its turn."""

    def __init__(self, host: str, port: int, connections: int) -> None:
        self._address = host, port
        self._connections = connections
        self._free: deque[_Connection] = deque()
        self._waiting: deque[tuple[bytes, OnAnswer]] = deque()
        self._broken: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Connect all of them. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._broken = loop.create_future()
        for _ in range(self._connections):
            _, connection = await loop.create_connection(lambda: _Connection(self), *self._address)
            self._free.append(connection)

    def send(self, request: bytes, on_answer: OnAnswer) -> None:
        """Send this whole request as soon as a connection is free; `on_answer` hears of the answer."""
        if self._free:
            self._free.popleft().send(request, on_answer)
        else:
            self._waiting.append((request, on_answer))

    async def wait(self, done: asyncio.Event) -> None:
        """Wait for `done`. Raises ConnectionError when a connection broke before."""
        if self._broken is None:
            raise ConnectionError("it was never opened")
        waiting = asyncio.ensure_future(done.wait())
        watched: list[asyncio.Future[Any]] = [waiting, self._broken]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._broken.done():
            self._broken.result()

    def close(self) -> None:
        """Hang up."""
        if self._broken is not None:
            self._broken.cancel()
        for connection in self._free:
            connection.close()

    def is_free(self, connection: _Connection) -> None:
        """For a connection to say when its answer is whole."""
        if self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._free.append(connection)

    def broke(self) -> None:
        """For a connection to say when it ended."""
        if self._broken is not None and not self._broken.done():
            self._broken.set_exception(ConnectionError("the server hung up"))


class _Connection(asyncio.Protocol):
    def __init__(self, client: Client) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._read = b""
        self._on_answer: OnAnswer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport) or hasattr(transport, "write"):
            self._transport = transport  # type: ignore[assignment]  # uvloop's own class

    def connection_lost(self, error: Exception | None) -> None:
        self._client.broke()

    def send(self, request: bytes, on_answer: OnAnswer) -> None:
        self._on_answer = on_answer
        if self._transport is not None:
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._read = self._read + data if self._read else data
        head_ends = self._read.find(b"\r\n\r\n")
        if head_ends < 0:
            return
        head = self._read[:head_ends]
        length = _LENGTH.search(head)
        ends = head_ends + 4 + (int(length[1]) if length else 0)
        if len(self._read) < ends:
            return
        answer = Answer(int(head[_STATUS]), head, self._read[head_ends + 4 : ends])
        self._read = self._read[ends:]
        on_answer, self._on_answer = self._on_answer, None
        # First the connection: what the answer leads to may need it.
        self._client.is_free(self)
        if on_answer is not None:
            on_answer(answer)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
