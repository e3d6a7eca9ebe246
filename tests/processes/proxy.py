"""A TCP proxy that fails on demand, in a thread of the test process: between our processes and Redis or Postgres.

    with Proxy.to(settings.redis_url) as proxy:
        start(redis_url=proxy.url(settings.redis_url))
        proxy.drop_reply(lambda request: b"EVAL" in request)
        ...
        assert proxy.dropped == 1

A fault holds for every connection, those there are and new ones, from the moment its method returns until `restore`.
Every fault is counted, so that a test can show that it fired.

It sees chunks as they come from the socket, not messages. A client that asks, waits for the answer and asks again
(libpq, redis-py) sends one request in one chunk, unless it is large.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

#: Closes without a word to the other side but a RST, and without sending what is still buffered.
_LINGER_ZERO = struct.pack("ii", 1, 0)

# The thread does nothing that lasts; one that does not answer this long is broken.
_ANSWER_SECONDS = 10.0


class Proxy:
    """Listens on a free loopback port while the context is open, and carries every connection to `host`:`port`.

    When the server cannot be reached, a client's connection is broken, as it is by `cut`. On leaving the context all
    connections are broken and the thread has ended.

    Counters, from the start on:
    `connections` that were taken, those refused included; `refused`, broken at once by `cut`; `broken`, those that
    `cut` found open; `held`, chunks kept back by `hold`; `delayed`, chunks that came late; `dropped`, replies
    swallowed.
    """

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._none_left = asyncio.Event()
        self._connecting: set[asyncio.Task[None]] = set()
        self._rules: list[_Rule] = []
        self._cutting = False
        self._holding = False
        self._hold_when: Callable[[bytes], bool] | None = None
        self._delay = 0.0
        self.port = 0
        self.connections = 0
        self.refused = 0
        self.broken = 0
        self.held = 0
        self.delayed = 0
        self.dropped = 0

    @classmethod
    def to(cls, url: str) -> Self:
        """A proxy to the host and port of a URL, which has to name both."""
        parts = urlsplit(url)
        if parts.hostname is None or parts.port is None:
            raise ValueError("the URL names no host or no port")
        return cls(parts.hostname, parts.port)

    def url(self, original: str) -> str:
        """The same URL by way of this proxy."""
        parts = urlsplit(original)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}").geturl()

    # Faults

    def cut(self) -> None:
        """Break every connection (RST), and each new one as soon as it is made."""

        def cut() -> None:
            self._cutting = True
            self.broken += len(self._links)
            self._break_all()

        self._run(cut)

    def hold(self, when: Callable[[bytes], bool] | None = None) -> None:
        """Be a black hole: take connections and bytes, pass on nothing in either direction, not even that one side
        closed. Connections stay open.

        With `when`, from the first request on for which `when(chunk)` is true: that request is kept back already.
        """

        def hold() -> None:
            self._holding = when is None
            self._hold_when = when

        self._run(hold)

    def delay(self, seconds: float) -> None:
        """Pass every chunk on that much later, in each direction; the order stays."""

        def delay() -> None:
            self._delay = seconds

        self._run(delay)

    def drop_reply(self, when: Callable[[bytes], bool], times: int = 1) -> None:
        """Let the next `times` requests for which `when(chunk)` is true be executed and their replies be lost.

        The request is passed on. When the first bytes of its reply come, they are swallowed and the client's
        connection is broken; the server sees it close. `when` runs in the proxy's thread.
        """
        self._run(lambda: self._rules.append(_Rule(when, times)))

    def restore(self, *, deliver: bool = False) -> None:
        """Carry everything again, and forget about replies to be dropped.

        What `hold` kept back is lost, and the connections that it belonged to are broken; the others live on. With
        `deliver` it arrives now, as after an outage that was shorter than TCP's patience.
        """

        def restore() -> None:
            lose = self._holding and not deliver
            self._cutting = self._holding = False
            self._hold_when = None
            self._delay = 0.0
            self._rules.clear()
            for link in [*self._links]:
                if lose and link.keeps_something:
                    link.break_off()
                else:
                    link.deliver_all()

        self._run(restore)

    @property
    def open(self) -> int:
        """How many connections there are now."""
        return len(self._links)

    # The thread

    def __enter__(self) -> Self:
        self._thread.start()
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = listener.getsockname()[1]

        async def serve() -> None:
            self._server = await self._loop.create_server(lambda: _Link(self).client, sock=listener)

        asyncio.run_coroutine_threadsafe(serve(), self._loop).result(_ANSWER_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_ANSWER_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ANSWER_SECONDS)
        self._loop.close()

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in [*self._connecting]:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        self._break_all()
        if self._links:
            await self._none_left.wait()
        await self._server.wait_closed()

    def _run(self, change: Callable[[], None]) -> None:
        """Make a change in the thread, and return when it is made."""

        async def run() -> None:
            change()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(_ANSWER_SECONDS)

    def _break_all(self) -> None:
        for link in [*self._links]:
            link.break_off()


@dataclass
class _Rule:
    """A reply to be lost, `left` times."""

    when: Callable[[bytes], bool]
    left: int


class _Link:
    """One client's connection and the one to the server that was made for it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client = _End(self)
        self.server = _End(self)
        self._connecting = True
        self.client.peer, self.server.peer = self.server, self.client

    @property
    def keeps_something(self) -> bool:
        """Whether bytes or a close are on their way."""
        return bool(self.client.kept or self.server.kept)

    def deliver_all(self) -> None:
        """Pass on at once whatever was kept."""
        for end in (self.client, self.server):
            end.deliver_all()

    def break_off(self) -> None:
        """Break both connections."""
        for end in (self.client, self.server):
            end.kept.clear()
            end.reset()

    def taken(self) -> None:
        """A client came."""
        proxy = self.proxy
        proxy.connections += 1
        proxy._links.add(self)
        proxy._none_left.clear()
        if proxy._cutting:
            proxy.refused += 1
            self._connecting = False
            self.break_off()
            return
        task = proxy._loop.create_task(self._connect())
        proxy._connecting.add(task)
        task.add_done_callback(proxy._connecting.discard)

    async def _connect(self) -> None:
        try:
            await self.proxy._loop.create_connection(lambda: self.server, *self.proxy._upstream)
        except OSError:
            self.break_off()
        finally:
            self._connecting = False
        if self.proxy._cutting or not self.client.alive:
            self.break_off()
        self.ended()

    def ended(self) -> None:
        """Forget it when both connections are over."""
        if not (self._connecting or self.client.alive or self.server.alive):
            self.proxy._links.discard(self)
            if not self.proxy._links:
                self.proxy._none_left.set()

    def look_at(self, request: bytes) -> None:
        """See whether a fault begins with this request."""
        proxy = self.proxy
        if proxy._hold_when is not None and proxy._hold_when(request):
            proxy._holding, proxy._hold_when = True, None
        for rule in proxy._rules:
            if rule.left > 0 and rule.when(request):
                rule.left -= 1
                self.server.swallows = True
                return


class _End(asyncio.Protocol):
    """One of the two connections of a link. What comes in here goes out at its peer."""

    peer: _End

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._proxy = link.proxy
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: Chunks from here on their way to the peer, each with the time of its arrival; None: this end closed.
        self.kept: deque[tuple[float, bytes | None]] = deque()
        #: The next chunk from here is a reply that gets lost.
        self.swallows = False

    @property
    def alive(self) -> bool:
        """Whether its socket is open."""
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self is self._link.client:
            self._link.taken()
        else:
            self.peer.deliver_due()

    def data_received(self, data: bytes) -> None:
        link, proxy = self._link, self._proxy
        if self.swallows:
            proxy.dropped += 1
            # What was sent is executed to its end: the server is only told that nobody listens any more.
            self.peer.reset()
            self.finish()
            return
        if self is link.client:
            link.look_at(data)
        self._hand_over(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._hand_over(None)
        self._link.ended()

    def pause_writing(self) -> None:
        if self.peer._transport is not None:
            self.peer._transport.pause_reading()

    def resume_writing(self) -> None:
        if self.peer._transport is not None:
            self.peer._transport.resume_reading()

    def _hand_over(self, data: bytes | None) -> None:
        proxy = self._proxy
        if not self.kept and not proxy._holding and not proxy._delay and self.peer.alive:
            self.peer.put(data)
            return
        if data is not None:
            proxy.held += proxy._holding
            proxy.delayed += proxy._delay > 0
        self.kept.append((proxy._loop.time() + proxy._delay, data))
        self.deliver_due()

    def deliver_due(self) -> None:
        """Pass on what was kept long enough; the rest later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = self._proxy._loop
        while self.kept and not self._proxy._holding and self.peer.alive:
            due, data = self.kept[0]
            if due > loop.time():
                self._timer = loop.call_at(due, self.deliver_due)
                return
            self.kept.popleft()
            self.peer.put(data)

    def deliver_all(self) -> None:
        """Pass on all that was kept, the youngest as well."""
        self.kept = deque((0.0, data) for _, data in self.kept)
        self.deliver_due()

    def put(self, data: bytes | None) -> None:
        """Send this out here; None: close after what was sent before."""
        if data is None:
            self.finish()
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def finish(self) -> None:
        """Close when all is sent."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Close at once, with a RST, whatever was still to be sent."""
        if self._transport is not None:
            connection: socket.socket = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            self._transport.abort()
