"""The access log: one line of JSON per request on standard output.

    {"event":"request","time":"2026-01-31T09:00:00.123Z","request_id":"5f1c…","method":"POST","path":"/v1/purchases",
     "status":202,"ms":4.2,"bytes":312,"client":"shop","peer":"203.0.113.7"}

`time` is when the answer was out, `ms` from the request's head to then, `bytes` those of the answer's body. `client` is
the name of the API key. `status` is null when the client left before it was answered, `path` when nothing is there
(see `producers.routed_path`: neither a query nor anything else that a client made up is logged). What a request could
have put a control character into is not in a line, and names from the configuration are escaped.

Lines are collected once per turn of the event loop, and written together by a thread: a terminal that was stopped
with Ctrl-S, or a full pipe that nobody reads, holds up no request. Lines beyond a bound are lost then, and counted:

    {"event":"access_log_lost","time":"2026-01-31T09:00:00.123Z","lines":17}
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Final

import msgspec
from starlette.types import Scope

from producers.request_ids import request_id
from producers.routed_path import RoutedPaths

_STANDARD_OUTPUT: Final = 1
#: Lines that wait to be written, at most; as many again may be under way. Some seconds of a busy process, in 3 MB.
_MOST_WAITING: Final = 10_000
#: Seconds for which the end waits for lines to be written. A reader that reads takes milliseconds; process runners kill
#: after ten seconds, of which requests under way may have used eight.
_END_WITHIN: Final = 1.0


class Line(msgspec.Struct, frozen=True):
    """One request, as it is written."""

    event: str
    time: str
    request_id: str
    method: str | None
    path: str | None
    status: int | None
    ms: float
    bytes: int
    client: str | None
    peer: str | None


class Lost(msgspec.Struct, frozen=True):
    """That lines could not be written; they are gone."""

    event: str
    time: str
    lines: int


_encode = msgspec.json.Encoder().encode
_Ended = tuple[Scope, int | None, float, int]


class AccessLog:
    """Writes to a file descriptor, by default standard output. A full disk costs lines, and nobody an answer.

    Used on one event loop, until `end`.
    """

    def __init__(self, descriptor: int = _STANDARD_OUTPUT) -> None:
        self._paths = RoutedPaths()
        self._ended: list[_Ended] = []
        self._writer = _Writer(descriptor)

    @property
    def lost(self) -> int:
        """How many lines were lost and not told of yet."""
        return self._writer.lost

    def add(self, scope: Scope, status: int | None, seconds: float, size: int) -> None:
        """A request has ended: answered with `status` after `seconds`, with a body of `size` bytes.

        Of a request whose head could not be read, `scope` has what is known: `{"client": peer}` at least.
        """
        if not self._ended:
            asyncio.get_running_loop().call_soon(self.flush)
        self._ended.append((scope, status, seconds, size))

    def flush(self) -> None:
        """Have what was collected written. Does not wait."""
        ended, self._ended = self._ended, []
        if not ended:
            return
        now = _now()
        taken = ended[: self._writer.room]
        self._writer.write([_encode(self._line(now, *request)) for request in taken], lost=len(ended) - len(taken))

    def end(self) -> None:
        """Write what there is, and no more after it. Waits for a second at most."""
        self.flush()
        self._writer.end()

    def _line(self, now: str, scope: Scope, status: int | None, seconds: float, size: int) -> Line:
        peer = scope.get("client")
        client = scope.get("state", {}).get("client")
        return Line(
            event="request",
            time=now,
            request_id=request_id(scope),
            method=scope.get("method"),
            path=_plain(self._paths.of(scope, status)),
            status=status,
            ms=round(seconds * 1_000, 3),
            bytes=size,
            client=_plain(client),
            peer=peer[0] if peer else None,
        )


def _now() -> str:
    seconds, milliseconds = divmod(time.time_ns() // 1_000_000, 1_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03d}Z"


def _plain(text: str | None) -> str | None:
    """JSON escapes quotes and C0; terminals and other readers of logs also act on C1, DEL and odd line ends."""
    if text is None or (text.isascii() and text.isprintable()):
        return text
    return ascii(text)[1:-1]


class _Writer:
    """Writes lines in a thread of its own, which begins with the first."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # What both threads use, under `_changed`.
        self._waiting: list[bytes] = []
        self._lost = 0
        self._ending = False
        #: The last line that was begun has no end, as the rest of it could not be written.
        self._torn = False

    @property
    def lost(self) -> int:
        with self._changed:
            return self._lost

    @property
    def room(self) -> int:
        """How many lines are taken at this moment. Only the writing thread makes it more."""
        with self._changed:
            return _MOST_WAITING - len(self._waiting)

    def write(self, lines: list[bytes], lost: int) -> None:
        """Have these written, in order. So many others found no room."""
        with self._changed:
            self._waiting += lines
            self._lost += lost
            self._changed.notify()
        if self._thread is None:
            # A daemon: a write that never ends must not keep the process.
            self._thread = threading.Thread(target=self._work, name="access-log", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Return once all is written, or cannot be for a while."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_END_WITHIN)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                lines, self._waiting = self._waiting, []
                lost = self._lost
            if not lines:
                return
            self._put(lines, lost)

    def _put(self, lines: list[bytes], lost: int) -> None:
        """Write these, behind word of those that were lost."""
        word = [_encode(Lost("access_log_lost", _now(), lost))] if lost else []
        left = memoryview(b"\n" * self._torn + b"\n".join([*word, *lines, b""]))
        try:
            while left:
                size = os.write(self._descriptor, left)
                # Then the next line is not to be glued to what there is of this one.
                self._torn = left[size - 1] != ord("\n")
                left = left[size:]
        except OSError:
            pass
        ends = bytes(left).count(b"\n")
        failed = min(ends, len(lines))
        told = lost if ends <= len(lines) else 0
        with self._changed:
            self._lost += failed - told
