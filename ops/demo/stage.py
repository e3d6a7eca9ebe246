"""The stage of a demo: a folder of its own, servers, provider and every process of the Procfile on free ports."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

from ops import stack
from ops.embedded import EmbeddedServers
from ops.embedded.ports import LOOPBACK, free_port
from ops.sandbox import ProviderProcess
from shared.calling import make_celery
from shared.settings import Settings, load_settings

#: Seconds a payment takes at the sandbox provider: a quick card payment.
LATENCY = 0.05

#: All processes answer within a few seconds; on a loaded machine with two cores it has taken twenty.
_READY_WITHIN = 60.0
_LOOK_EVERY = 0.1
_PING_WITHIN = 0.5
#: Longer than the stack gives its processes, so that it can end them itself.
_STOP_WITHIN = stack.STOP_WITHIN + 5.0
_LOG_TAIL = 25

#: What a person's shell sets for these programs must not reach the demo; what one message stands for may.
_FOREIGN = ("FAIRLANE_", "CELERY_", "FLOWER_")
_KEPT = frozenset({"FAIRLANE_DELIVERY"})


class StageError(Exception):
    """The processes did not come up, or one of them ended. The message ends with the tail of their log."""


class Stage:
    """Everything a demo needs, as a context manager: up when entered, and nothing left when it ends.

    While it is taken down, Ctrl-C is ignored: it takes seconds, and half of it would leave something behind.
    """

    def __init__(self) -> None:
        self._closing = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stage:
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _set_up(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fairlane-demo-"))
        self._closing.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.log = self.directory / "processes.log"
        servers = self._closing.enter_context(EmbeddedServers(self.directory))
        provider = self._closing.enter_context(ProviderProcess(self.directory / "provider", latency=LATENCY))
        self.secrets = {"shop": secrets.token_hex(8), "admin": secrets.token_hex(8)}
        self.flower_login = f"demo:{secrets.token_hex(6)}"
        self._set_environment(
            servers.environment()
            | {
                "FAIRLANE_PAYMENT_URL": provider.url,
                "FAIRLANE_API_KEYS": ",".join(f"{role}:{secret}:{role}" for role, secret in self.secrets.items()),
                "FAIRLANE_HOST": LOOPBACK,
                "FAIRLANE_PORT": str(free_port()),
                "FAIRLANE_FLOWER_AUTH": self.flower_login,
                "FAIRLANE_FLOWER_PORT": str(free_port()),
            }
        )
        self.settings: Settings = load_settings(*stack.NEEDED)
        self.api = f"http://{LOOPBACK}:{self.settings.port}"
        self.flower = f"http://{LOOPBACK}:{self.settings.flower_port}"
        self._start_processes()
        self._wait_ready()

    def _set_environment(self, ours: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith(_FOREIGN) and name not in _KEPT:
                del os.environ[name]
        os.environ.update(ours)

    def _start_processes(self) -> None:
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C in the terminal is for us, and we stop it. It also stops when we are gone.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ops.stack", "--owned"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=stack.find_procfile().directory,
                start_new_session=True,
            )
        self._closing.callback(self._stop_processes, self._process)

    def _stop_processes(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_WITHIN)
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def _wait_ready(self) -> None:
        """Wait until the API is ready and both kinds of worker answer."""
        deadline = time.monotonic() + _READY_WITHIN
        while not self._api_is_ready():
            self._look_again(deadline, "the API is not ready")
        with make_celery(self.settings) as celery:
            inspect = celery.control.inspect(timeout=_PING_WITHIN)
            while {name.partition("@")[0] for name in inspect.ping() or {}} != {"lanes", "charges"}:
                self._look_again(deadline, "the workers do not answer")

    def _look_again(self, deadline: float, problem: str) -> None:
        self.check()
        if time.monotonic() > deadline:
            raise StageError(f"{problem} after {_READY_WITHIN:g} s; the end of their log:\n{self._tail()}")
        time.sleep(_LOOK_EVERY)

    def _api_is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api}/readyz", timeout=2) as response:  # noqa: S310 - our own address
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError, ValueError):
            return False

    def check(self) -> None:
        """Raise StageError if a process ended: all end with it."""
        if self._process is not None and self._process.poll() is not None:
            raise StageError(f"a process ended, and all with it; the end of their log:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL:])

    def __exit__(self, *_: object) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._closing.close()
        finally:
            signal.signal(signal.SIGINT, before)
