"""A free TCP port on the loopback address."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"

_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 15_000  # Above the numbers that common services have by habit (5432, 6379, 8000, 9090, 11211).
_TRIES = 50  # Of some 17,000 ports a few hundred are taken at worst: 50 misses in a row do not happen.


def free_port() -> int:
    """Return a port on 127.0.0.1 that nobody listened on a moment ago.

    The port lies below the range from which the kernel takes the source ports of outgoing connections. A
    port inside that range can be taken by any client while its server restarts, even by a client that keeps
    trying to reach this very server: TCP then connects it to itself. The kernel is asked by binding.
    Somebody may still be quicker, so the caller must be ready to ask again.
    """
    highest = _first_ephemeral() - 1
    if highest > _LOWEST:
        for _ in range(_TRIES):
            port = random.randint(_LOWEST, highest)
            if _bindable(port):
                return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _first_ephemeral() -> int:
    try:
        return int(_RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768  # Linux' default; below that of macOS (49,152).


def _bindable(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True
