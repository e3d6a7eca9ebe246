"""Starting and ending the sandbox payment provider from Python."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

#: Seconds until a new provider must answer. It takes half a second; a loaded machine may need twenty times
#: that.
START_WITHIN = 30.0

#: Seconds a provider gets to end by itself: a second for the calls in progress, and room for a loaded
#: machine.
STOP_WITHIN = 5.0

#: Seconds between two looks at a starting provider.
LOOK_EVERY = 0.02


class ProviderError(RuntimeError):
    """The sandbox provider did not start."""


class ProviderProcess:
    """One sandbox provider with its files in `directory`; a context manager.

    It listens on the loopback only. Its port is free at the first start and the same at every later one, so
    that `url` stays true over `kill()` and `start()`; so do its charges. It ends when this process ends,
    however that ends: it watches a pipe that only this process holds open. `latency` is the seconds a charge
    takes.
    """

    def __init__(self, directory: Path, *, latency: float = 0.05) -> None:
        self.directory = directory
        self.ledger_file = directory / "provider-ledger.jsonl"
        self.log_file = directory / "provider.log"
        self._latency = latency
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address for `FAIRLANE_PAYMENT_URL`. Raises `ProviderError` before the first start."""
        if not self._port:
            raise ProviderError("the sandbox provider was not started yet")
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """The process id, while it runs."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start it and wait until it answers. Else raises `ProviderError` with its last words."""
        if self._process is not None:
            raise ProviderError("the sandbox provider is running")
        self.directory.mkdir(parents=True, exist_ok=True)
        port_file = self.directory / "provider.port"
        port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "ops.provider", "--owned", "--ledger", str(self.ledger_file)]
        command += ["--port", str(self._port), "--port-file", str(port_file), "--latency", str(self._latency)]
        with self.log_file.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for the starter, who then stops the provider
            # last.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_WITHIN
        try:
            while not port_file.exists():
                if self._process.poll() is not None:
                    raise ProviderError(f"the sandbox provider ended at once: {self._last_words()}")
                if time.monotonic() > deadline:
                    raise ProviderError(f"the sandbox provider did not start: {self._last_words()}")
                time.sleep(LOOK_EVERY)
        except BaseException:
            self.kill()
            raise
        self._port = int(port_file.read_text())

    def _last_words(self) -> str:
        lines = self.log_file.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def stop(self) -> None:
        """Ask it to end, and end it if it does not. Nothing happens when it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_WITHIN)
        self.kill()

    def kill(self) -> None:
        """End it with SIGKILL, in the middle of whatever it does. Its ledger stays."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None

    def __enter__(self) -> ProviderProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
