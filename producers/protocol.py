"""HTTP/1.1 as uvicorn speaks it (httptools), with bounds: no client can hold the process up by being slow or huge.

uvicorn reads a head of any size, and waits for the end of a request for ever. Here a request

- has a head of at most 64 KiB and 100 fields: else 431;
- is whole, its body included, within `request_within` of its first byte: else 408;
- has a body of which at most 1 MiB is read, whoever answered it meanwhile (`producers.limits` does, beyond 16 KiB);
- is HTTP: else 400.

These answers are problems like all others, the last of their connection, and in their turn: behind those of requests
that were sent before. A connection is kept idle for `keep_alive`, also before its first request. Beyond the bound on
connections a new one is answered 503 and closed; only `/healthz` is still served there, as a process that has much to
do must not be restarted for it.

What follows the last answer of a connection is read and dropped for a moment, also the rest of a request that was
answered before it was whole: if data were left unread, the kernel would reset the connection, and the client might
never see its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import httptools
from starlette.types import Scope
from uvicorn import Config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from producers import problems
from producers.connections import Bounds
from producers.problems import MALFORMED, REQUEST_TIMEOUT, TOO_LARGE, UNAVAILABLE, Problem
from producers.request_ids import HEADER, request_id
from producers.security_headers import completed
from producers.whole_answers import WholeAnswer

#: Bytes of a request's head. The longest valid one has about 1 KiB; browsers and proxies add a few more, and what
#: serves other sites under the same name may have set many cookies.
LARGEST_HEAD: Final = 64 * 1024
#: Fields of a head. Browsers and proxies together send thirty or so.
MOST_HEADERS: Final = 100
#: Bytes read of one request's body. More than 16 KiB is refused anyway; the rest of an ordinary mistake is read on, so
#: that its connection can be kept.
_READ_ON: Final = 1024 * 1024
#: Seconds and bytes for which a connection whose last answer is out is still read from: a slow round trip or two.
_LINGER: Final = 2.0
_LINGER_BYTES: Final = 1024 * 1024
#: Seconds for which one that is turned away may take to send what it wants answered.
_TURN_AWAY_WITHIN: Final = 1.0

_NO_HTTP: Final = Problem(MALFORMED, "This is not a request of HTTP/1.1 that can be read.")
_LATE: Final = Problem(REQUEST_TIMEOUT)
_HUGE_HEAD: Final = Problem(problems.HEADERS_TOO_LARGE)
_HUGE_BODY: Final = Problem(TOO_LARGE)
_FULL: Final = Problem(
    UNAVAILABLE, "This process has as many connections as it can serve. Nothing of the request was read."
)
_ALIVE: Final = b"GET /healthz "


class _OutOfBoundsError(Exception):
    """Stops the parser in the middle of a head."""


class _WayOut:
    """The connection as an answer has it: it is written to as ever, and `close` is ours."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Requests that come whole and in order, nearly all, cost it a few comparisons and no timer."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        bounds: Bounds,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = bounds
        self._way_out: asyncio.Transport
        #: The request that is being answered, or was last. Those behind it wait in `pipeline`.
        self._running: RequestResponseCycle | None = None
        #: The request being read: begun and not whole; its head is not whole.
        self._request_open = False
        self._head_open = False
        #: How many requests the data at hand had a part of.
        self._begun = 0
        #: Bytes of its head: those of whole fields, and the data that held no end of the head.
        self._parsed = 0
        self._unparsed = 0
        self._body_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None
        #: Nothing more is taken from this client, and how much of it was dropped.
        self._over = False
        self._dropped = 0
        #: The last answer is out, and so is the end of our side.
        self._lingering = False
        #: What it is to be told once the requests before are answered.
        self._last_word: Problem | None = None
        self._turned_away = False

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._way_out = cast("asyncio.Transport", _WayOut(transport, self._close))
        bounds = self._bounds
        if len(self.connections) - len(bounds.turned) <= bounds.connections:
            self._keep(bounds.keep_alive)
        elif len(bounds.turned) < bounds.turned_away:
            bounds.turned.add(self)
            self._turned_away = True
            self._keep(_TURN_AWAY_WITHIN)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        # uvicorn tells the latest request only, and others may be before it.
        if (running := self._running) is not None and not running.response_complete:
            if not running.response_started:
                cast("Scope", running.scope)["state"]["left"] = True
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)
        self._bounds.turned.discard(self)
        self._stop_deadline()
        self._unset_keepalive_if_required()
        self._over = True
        self._last_word = None

    def data_received(self, data: bytes) -> None:
        if self._over:
            self._drop(data)
            return
        if self._turned_away and self._latest is None and not self._request_open and not data.startswith(_ALIVE):
            self._refuse(_FULL)
            return
        # Data that brings the end of a request and the beginning of another cannot be told apart by size.
        self._begun = 1 if self._request_open else 0
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            bounded = isinstance(error.__context__, _OutOfBoundsError)
            self._refuse(_HUGE_HEAD if bounded else _NO_HTTP)
            return
        if not self._request_open or self._over:
            return
        if self._begun == 1 and not self._within_bounds(len(data)):
            return
        if self._deadline is None:
            self._start_deadline()

    def shutdown(self) -> None:
        if self._last_word is None:
            super().shutdown()

    # The request being read

    def on_message_begin(self) -> None:
        # Not at any data, as uvicorn has it: line breaks between requests would keep a connection for ever.
        self._unset_keepalive_if_required()
        self._request_open = self._head_open = True
        self._begun += 1
        self._parsed = self._unparsed = self._body_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_open:
            # A field behind the body must not be taken for one of the head (RFC 9110, 6.5.1). None is of use here.
            return
        # What `_count` and uvicorn do, written out: a crowd sends a million fields, and each call is felt.
        self._parsed += len(name) + len(value) + len(": \r\n")
        if self._parsed > LARGEST_HEAD or len(self.headers) >= MOST_HEADERS:
            raise _OutOfBoundsError
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._head_open = False
        # Its task has not begun yet, and uvicorn cannot be told of which class it is to be.
        self.cycle.__class__ = WholeAnswer
        self.cycle.transport = self._way_out
        if len(self.pipeline) == 1:
            # uvicorn would read no more, and so would not see that the client hangs up. It stops at the next.
            self.flow.resume_reading()
        if self._turned_away:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._request_open = False
        self._stop_deadline()
        super().on_message_complete()
        if self.cycle.response_complete and not self._over:
            # Answered before it was whole, so the time until the next request begins now.
            self._unset_keepalive_if_required()
            self._keep(self._bounds.keep_alive)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self._lingering:
            # Neither a next request nor the time for one begins.
            self.server_state.total_requests += 1
            return
        # uvicorn starts the next request in this call, or keeps the connection.
        last = not self.pipeline
        super().on_response_complete()
        if not last or self.transport.is_closing():
            return
        if self._last_word is not None:
            self._say(self._last_word)
        elif self._request_open:
            # This one's body or the next request is still coming: its deadline counts.
            self._unset_keepalive_if_required()

    def _feed(self, data: bytes) -> None:
        """Have this parsed. Raises HttpParserError.

        A request to go on in another protocol is answered in this one (RFC 9110, 7.8). The parser leaves its body
        unread, so it is read again without the wish. Java's HTTP client, for one, wishes for HTTP/2 every time.
        """
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
                head = _without_upgrade(self.parser, self.url, self.headers)
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(head)

    def _count(self, size: int) -> None:
        self._parsed += size
        if self._parsed > LARGEST_HEAD:
            raise _OutOfBoundsError

    def _within_bounds(self, size: int) -> bool:
        """Count data that brought no new request; whether the one being read may go on."""
        if self._head_open:
            self._unparsed += size
            if self._unparsed > LARGEST_HEAD:
                self._refuse(_HUGE_HEAD)
                return False
        else:
            self._body_bytes += size
            if self._body_bytes > _READ_ON:
                self._refuse(_HUGE_BODY)
                return False
        return True

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self._bounds.request_within, self._on_deadline)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if not self._request_open or self._over:
            return
        if self.flow.read_paused:
            # It is not the client that is slow: we do not read on before an earlier request is answered.
            self._start_deadline()
            return
        self._refuse(_LATE)

    @property
    def _latest(self) -> RequestResponseCycle | None:
        """The latest request whose head was whole, and its answer."""
        return self.cycle

    # The last word

    def _refuse(self, problem: Problem) -> None:
        """Take nothing more from this client, and tell it why in its turn."""
        self._over = True
        self._stop_deadline()
        self._unset_keepalive_if_required()
        cycle = self._latest
        of_cycle = self._request_open and not self._head_open
        if of_cycle and self.pipeline and self.pipeline[0][0] is cycle:
            # Its turn has not come, so nobody works at it.
            self.pipeline.popleft()
            self._last_word = problem
        elif cycle is None or cycle.response_complete:
            if of_cycle:
                self._linger()
            else:
                self._say(problem)
        elif not of_cycle:
            self._last_word = problem
        elif cycle.response_started:
            # Half an answer is out. Only breaking the connection tells the client that it is not whole.
            self.transport.close()
        else:
            # Whoever waits for the rest of the request hears that the client is gone. The access log has their line.
            scope = cast("Scope", self.scope)
            scope["state"]["refused"] = problem.problem_type.status
            cycle.disconnected = True
            cycle.message_event.set()
            self._say(problem, scope)

    def _say(self, problem: Problem, scope: Scope | None = None) -> None:
        """Answer, as the last of this connection, a request that has this scope or none."""
        self._last_word = None
        self._unset_keepalive_if_required()
        nobodys = scope is None
        if scope is None:
            scope = {"client": self.client, "headers": []}
        answer = problems.response(problem)
        headers = [
            *self.server_state.default_headers,
            *completed(answer.raw_headers),
            (HEADER.lower().encode(), request_id(scope).encode()),
            (b"connection", b"close"),
        ]
        content = [STATUS_LINE[answer.status_code], *(b"%b: %b\r\n" % header for header in headers), b"\r\n"]
        self.transport.write(b"".join([*content, answer.body]))
        if nobodys and self._bounds.access_log is not None:
            self._bounds.access_log.add(scope, answer.status_code, 0.0, len(answer.body))
        self._linger()

    def _close(self) -> None:
        """What an answer does that is the last of its connection, or was broken off."""
        running = self._running
        if running is not None and running.response_complete and self._request_open:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Send the end of our side, and close once the client has, or a moment later."""
        self._over = self._lingering = True
        self._last_word = None
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._keep(_LINGER)

    def _drop(self, data: bytes) -> None:
        self._dropped += len(data)
        if self._dropped > _LINGER_BYTES:
            self.transport.abort()

    def _keep(self, seconds: float) -> None:
        """Close the connection after this long, unless it begins a request before."""
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)


def _without_upgrade(parser: httptools.HttpRequestParser, url: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """The head that was just parsed, without its wish for another protocol. Raises HttpParserError for a tunnel."""
    method = parser.get_method()
    if method == b"CONNECT":
        raise httptools.HttpParserError("no tunnel is dug here")
    lines = [b"%b %b HTTP/%b" % (method, url, parser.get_http_version().encode())]
    for name, value in headers:
        if name == b"connection":
            tokens = (token.strip() for token in value.split(b","))
            value = b", ".join(token for token in tokens if token.lower() != b"upgrade")
        lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join([*lines, b"", b""])
