"""Connections of an API process: how many there may be, and how those are let go whose peer is gone.

file limit ─▶ bound ─▶ within it: served
                   └─▶ beyond it: answered 503 and closed; a bounded number of those at once, others are cut
"""

from __future__ import annotations

import resource
import socket
from dataclasses import dataclass, field
from typing import Any, Final

from producers.access_log import AccessLog
from shared.errors import SettingsError
from shared.settings import PREFIX, Settings

#: Connections that wait to be taken up. A crowd arrives at once; the kernel's own limit (4,096) is the next.
BACKLOG: Final = 4_096
#: Connections served at once unless set: far more than one process answers in a second, and at the 14 KB that were
#: measured for an idle one, 140 MB.
_USUAL_CONNECTIONS: Final = 10_000
#: Those being turned away at once, at most. Each takes one exchange with its peer.
_MOST_TURNED_AWAY: Final = 1_000
#: Files that are no client's: Postgres (`DATABASE_POOL`, 100 at most), Redis, the broker, files that are read.
_OTHER_FILES: Final = 200

#: After half a minute without a word the kernel asks whether the peer is there, three times, ten seconds apart: one
#: that vanished is noticed within a minute, as it is by proxies.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
#: Milliseconds for which what we sent may stay unacknowledged, or a peer may take nothing of its answer. A mobile
#: connection that stands still for longer is begun anew by its client.
_USER_TIMEOUT: Final = 20_000


@dataclass(frozen=True)
class Bounds:
    """What the connections of one process are held to; times in seconds.

    `connections` are served at once, `turned_away` beyond them are told so at once. `turned` are these now.
    """

    connections: int
    turned_away: int
    request_within: float
    keep_alive: float
    access_log: AccessLog | None = None
    turned: set[Any] = field(default_factory=set)


def bounds_of(settings: Settings, access_log: AccessLog | None) -> Bounds:
    """The bounds of this process. Raises SettingsError when it may not open files enough for them."""
    files = _raise_file_limit()
    turned_away = min(_MOST_TURNED_AWAY, files // 8)
    most = files - turned_away - _OTHER_FILES
    connections = settings.connections or min(_USUAL_CONNECTIONS, most)
    if connections > most or connections < 1:
        needed = f"{connections:,} connections" if connections > 0 else "connections"
        raise SettingsError(
            f"{PREFIX}CONNECTIONS: this process may open {files:,} files (ulimit -n), too few for {needed}"
        )
    return Bounds(connections, turned_away, settings.request_within, settings.keep_alive, access_log)


def listen(host: str, port: int, user_timeout: int = _USER_TIMEOUT) -> socket.socket:
    """A socket that listens there; its connections are dropped by the kernel when their peer is gone. Raises OSError.

    `user_timeout` is in milliseconds.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    # Connections inherit these. Each is absent on some system.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {**_KEEPALIVE, "TCP_USER_TIMEOUT": user_timeout}.items():
        if option := getattr(socket, name, None):
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
    return listener


def _raise_file_limit() -> int:
    """Let this process open as many files as it may ask for; how many that is.

    The soft limit is 1,024 on most systems, for the sake of programs that use select(2). This one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            # What macOS answers to a hard limit that is infinite.
            pass
    return 1_000_000 if soft == unlimited else soft
