"""What pytest-celery calls a container, answered by processes.

`ProcessContainer` answers what the plugin asks: id, name, status, attrs, reload, restart, kill, logs,
exec_run, ready, teardown. `RedisContainer` wraps a Redis server that already runs, `WorkerContainer` a
Celery worker.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any, Protocol
from urllib.parse import urlsplit

import redis
from celery import __version__ as celery_version
from celery.utils.nodenames import default_nodename, host_format
from pytest_celery import CeleryTestContainer
from pytest_docker_tools import exceptions as docker_errors

from tests.processes.process import READY_SECONDS, OwnedProcess, wait_for

# Celery reads its options from CELERY_<COMMAND>_<OPTION> too. This one loads the plugin's ping task into a
# worker whose command line is not ours to change.
PING_TASK = {"CELERY_WORKER_INCLUDE": "pytest_celery.vendors.worker.tasks"}
# The log line of a worker that consumes; written at level INFO.
WORKER_READY = "ready."


class Server(Protocol):
    """A running process with the means to end it and to start it again. `OwnedProcess` is one."""

    @property
    def pid(self) -> int: ...
    @property
    def alive(self) -> bool: ...
    def send_signal(self, number: int) -> None: ...
    def kill(self) -> object: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def restart(self) -> object: ...
    def logs(self) -> str: ...


class ProcessContainer(CeleryTestContainer):  # type: ignore[misc]
    """A process in the place of a container. It owns nothing: who started the process ends it.

    `id` stays the same over restarts, as a container's does. `status` is always fresh: "running" or "exited".
    """

    def __init__(self, name: str, process: Server, *, env: Mapping[str, str] | None = None) -> None:
        super().__init__(self)  # wrapper and wrapped in one: `env`, `ips` and `ports` read `attrs` below
        self.process = process
        self._name = name
        self._id = uuid.uuid4().hex
        self._env = dict(env or {})

    @property
    def id(self) -> str:
        return self._id

    @property
    def name(self) -> str:
        return self._name

    @property
    def status(self) -> str:
        return "running" if self.process.alive else "exited"

    @property
    def attrs(self) -> dict[str, Any]:
        """The parts of an engine's description that the plugin reads. No networks, no published ports."""
        state = {"Status": self.status, "Pid": self.process.pid if self.process.alive else 0}
        return {
            "Id": self.id,
            "Name": self.name,
            "State": state,
            "Config": {
                "Hostname": self.id[:12],
                "Env": [f"{key}={value}" for key, value in self._env.items()],
            },
            "HostConfig": {"PortBindings": {}},
            "NetworkSettings": {"Networks": {}, "Ports": {}},
        }

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {}

    def reload(self) -> None:
        """Nothing to fetch: status and attrs are read when asked for."""

    def logs(self) -> str:
        return self.process.logs()

    def kill(self, signal: str | int | None = None) -> None:
        """SIGKILL, the default, goes to all processes and waits until they are gone; others are only sent."""
        number = signal_number(signal)
        if number == SIGKILL:
            self.process.kill()
        else:
            self.process.send_signal(number)

    def restart(self, timeout: float = READY_SECONDS) -> None:
        """Start anew and wait until ready. `timeout`, seconds, is the plugin's and bounds the readiness."""
        self.process.restart()
        self._await_ready(timeout)

    def ready(self) -> bool:
        """Wait until ready. Raises the plugin's ContainerFailed or, after READY_SECONDS, TimeoutError."""
        self._await_ready(READY_SECONDS)
        return True

    def exec_run(self, command: str | Sequence[str]) -> tuple[int, bytes]:
        """Run a command beside the process, in its environment; returns its exit code and all its output."""
        argv = shlex.split(command) if isinstance(command, str) else list(command)
        done = subprocess.run(
            argv,
            env=self._env or None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=READY_SECONDS,
            check=False,
        )
        return done.returncode, done.stdout

    def answers(self) -> bool:
        """True when the process does its work. A subclass knows how to ask it."""
        return True

    def _await_ready(self, bound: float) -> None:
        met = wait_for(lambda: self.status == "exited" or self.answers(), bound)
        if self.status == "exited":
            raise docker_errors.ContainerFailed(self, f"{self.name} has exited; its log ends:\n{self.logs()[-3000:]}")
        if not met:
            raise docker_errors.TimeoutError(f"{self.name} was not ready within {bound:g} s")


class RedisContainer(ProcessContainer):
    """A Redis or Valkey server at `url`, ``redis://127.0.0.1:<port>/<database>``, for broker and results."""

    def __init__(self, name: str, process: Server, *, url: str) -> None:
        super().__init__(name, process)
        self.url = url

    @property
    def client(self) -> redis.Redis:
        """A new client. A second is ample on loopback, and a paused server must not stop the test."""
        return redis.Redis.from_url(
            self.url, decode_responses=True, socket_timeout=1, socket_connect_timeout=1, retry=None
        )

    @property
    def celeryconfig(self) -> dict[str, Any]:
        parts = urlsplit(self.url)
        return {
            "url": self.url,
            "host_url": self.url,
            "hostname": parts.hostname,
            "port": parts.port,
            "vhost": parts.path.strip("/") or "0",
        }

    def answers(self) -> bool:
        try:
            with contextlib.closing(self.client) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker's command line says of it."""

    hostname: str = "celery@%h"  #: node name, with Celery's abbreviations
    queues: tuple[str, ...] = ("celery",)  #: what it consumes; the plugin's ping goes to the first
    loglevel: str = "WARNING"  #: Celery's own default

    @classmethod
    def read(cls, argv: Sequence[str], queues: Sequence[str] = ()) -> WorkerOptions:
        """Find the options among a command line's words: ``--name value``, ``--name=value``, ``-n value``.

        `queues` is for a worker whose queues are set by its app and not by ``--queues``.
        """

        def option(default: str, *names: str) -> str:
            for word, following in zip(argv, [*argv[1:], ""], strict=True):
                name, equals, value = word.partition("=")
                if name in names:
                    return value if equals else following
            return default

        return cls(
            hostname=option(cls.hostname, "--hostname", "-n"),
            queues=tuple(queues) or tuple(option(",".join(cls.queues), "--queues", "-Q").split(",")),
            loglevel=option(cls.loglevel, "--loglevel", "-l").upper(),
        )

    @property
    def node_name(self) -> str:
        """The name the worker answers to on this machine: ``lanes@<hostname>``."""
        return host_format(default_nodename(self.hostname))


def worker_process(
    app: str,
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> OwnedProcess:
    """A worker of the app in module `app`, not yet started. It also knows the plugin's ping task."""
    command = (sys.executable, "-m", "celery", "-A", app, "worker", *argv)
    return OwnedProcess(command, log=log, env=PING_TASK | dict(env or {}), cwd=cwd, name=app)


class WorkerContainer(ProcessContainer):
    """A Celery worker. Ready once the run's log says so, which needs ``--loglevel INFO``.

    A quieter worker counts as ready while it runs; ask ``celery_setup.ready(control=True)`` then.
    """

    def __init__(self, name: str, process: OwnedProcess, options: WorkerOptions) -> None:
        super().__init__(name, process, env=process.env)
        self.options = options
        self._worker = process

    @property
    def ready_prompt(self) -> str | None:
        return WORKER_READY if self.options.loglevel in ("INFO", "DEBUG") else None

    def answers(self) -> bool:
        return self.ready_prompt is None or self.ready_prompt in self._worker.logs_of_run()

    def version(self) -> str:
        return celery_version

    def log_level(self) -> str:
        return self.options.loglevel

    def worker_name(self) -> str:
        return self.options.node_name.partition("@")[0]

    def worker_queue(self) -> str:
        return self.options.queues[0]


def signal_number(name: str | int | None) -> int:
    """A signal as the plugin names it: "SIGTERM", "TERM", 15; None is SIGKILL."""
    if name is None:
        return SIGKILL
    if isinstance(name, int):
        return name
    return Signals[name if name.startswith("SIG") else f"SIG{name}"]
