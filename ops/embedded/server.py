"""The life of one embedded server, whatever it serves.

```
 start ─▶ lock the folder ─▶ end leftovers ─▶ prepare ─▶ spawn + guard ─▶ ready, really connected
 stop  ─▶ polite signal ─▶ (bound) SIGKILL of server and children ─▶ guard ended
 kill  ─▶ SIGKILL of server and children ─▶ guard ended
 owner gone ─▶ guard: as stop
```

*One server per folder.* `start` holds a file lock on the folder while it works. It writes a record beside
the data: the server, its port and its owner. A server that still runs although its owner is gone is a
leftover, and it is stopped before a new one starts; a leftover is not adopted, as nobody here could wait
for it or tell how it was started. If its owner is alive, `start` refuses: two owners would stop each
other's server.

*Nothing surprising after fork.* There is no atexit and no finalizer. A forked copy of the object does not
own the server: there, `pid` is None and `stop` and `kill` do nothing. An owner that ends without `stop`,
however it ends, is noticed by the guard within a second.

An object is not for use by several threads at once; the thread that started a server may end.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from ops.embedded import processes
from ops.embedded.errors import EmbeddedError
from ops.embedded.launch import Launch, server_environment
from ops.embedded.ports import free_port

_PORT_TRIES = 5  # Losing the race for a random port is rare; five in a row mean something else is wrong.
_LOCK_WITHIN = 90.0  # Seconds: a start takes a few; a lock held for so long means that one hangs.
_LOG_LIMIT = 16_000_000  # Bytes: a log a person can still open. A longer one is set aside at the next start.
_TAIL_LINES = 20  # The cause of a failed start stands in the last few lines.


@dataclass(frozen=True)
class _Record:
    server: int
    port: int
    owner: int
    owner_birth: str | None


class _AddressTaken(EmbeddedError):
    """Somebody else was quicker to listen on the port."""


class EmbeddedServer(ABC):
    """A server process that this process owns, with its data in `directory`.

    `port`: listen there; None: on a free port, chosen at the first start and kept for the life of the
    object, so that clients find the server again after `kill` and `start`.
    """

    name: ClassVar[str]  #: What the process table calls the server.
    stop_signal: ClassVar[signal.Signals]  #: The polite request to stop.
    stop_within: ClassVar[float]  #: Seconds given to it.
    ready_within: ClassVar[float]  #: Seconds from spawn to the first answer.

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        self._home = directory.resolve()
        self._port = port
        self._mark = processes.mark_of(self._home / self.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    @property
    def port(self) -> int:
        """The port on 127.0.0.1; EmbeddedError before the first start, if none was given."""
        if self._port is None:
            raise EmbeddedError(f"{self.name} was not started yet")
        return self._port

    @property
    def pid(self) -> int | None:
        """The server's process id, or None when this process owns no running server."""
        process = self._own(self._process)
        return None if process is None or process.poll() is not None else process.pid

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self._home / f"{self.name}.log"

    def start(self) -> None:
        """Start the server and wait until it answers. Does nothing when it runs.

        Raises EmbeddedNotInstalled, or EmbeddedError when the folder's server belongs to another living
        owner, when a given port is taken, or when the server does not come up (with the end of its log).
        """
        if self.pid is not None:
            return
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._reap()
                self._end_leftovers()
                self._prepare()
                self._set_log_aside()
                self._launch()
        except (OSError, subprocess.SubprocessError) as error:
            raise EmbeddedError(f"{self.name} cannot be started: {error}") from error

    def stop(self) -> None:
        """Stop the server: politely, then by force. Does nothing when it does not run."""
        process = self._own(self._process)
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(self.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.stop_within)
        self.kill()

    def kill(self) -> None:
        """End the server and its children with SIGKILL, as a crash would. They are gone when this returns."""
        process = self._own(self._process)
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)  # No new children while the present ones are listed.
            children = [row.pid for row in processes.table() if row.parent == process.pid]
            process.kill()
            for child in children:
                processes.send(child, signal.SIGKILL)
            process.wait()
        self._kill_orphans()
        self._reap()

    def restart(self) -> None:
        """`stop`, then `start` on the same port."""
        self.stop()
        self.start()

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients find the server."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make what the server needs before its first start."""

    @abstractmethod
    def _command(self, port: int) -> Launch:
        """How to start the server."""

    @abstractmethod
    def _answers(self, port: int, pid: int) -> bool:
        """Whether the server on `port` takes commands and is the one just started, not a stranger."""

    def _own(self, process: subprocess.Popen[bytes] | None) -> subprocess.Popen[bytes] | None:
        return process if self._owner == os.getpid() else None

    def _launch(self) -> None:
        fixed = self._port
        for attempt in range(_PORT_TRIES):
            port = free_port() if fixed is None else fixed
            try:
                self._launch_on(port)
            except _AddressTaken as error:
                if fixed is not None or attempt == _PORT_TRIES - 1:
                    raise EmbeddedError(f"port {port} is taken; {error}") from error
            else:
                self._port = port
                return

    def _launch_on(self, port: int) -> None:
        launch = self._command(port)
        account = launch.account
        with self.log.open("ab") as log:
            begin = log.tell()
            self._owner = os.getpid()
            self._process = process = subprocess.Popen(
                launch.arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=launch.cwd,
                env=server_environment(),
                start_new_session=True,  # Ctrl-C goes to the owner alone, who decides what stops when.
                user=None if account is None else account.uid,
                group=None if account is None else account.gid,
                extra_groups=None if account is None else [],
            )
        try:
            self._write_record(_Record(process.pid, port, os.getpid(), processes.birth(os.getpid())))
            self._guard = processes.start_guard(process.pid, self._mark, self.name, self.stop_signal, self.stop_within)
            self._wait_ready(process, port, begin)
        except BaseException:
            self.kill()
            raise

    def _wait_ready(self, process: subprocess.Popen[bytes], port: int, begin: int) -> None:
        def settled() -> bool:
            return process.poll() is not None or self._answers(port, process.pid)

        in_time = processes.wait_until(settled, self.ready_within)
        if in_time and process.poll() is None:
            return
        tail = self._tail(begin)
        if "Address already in use" in tail:
            raise _AddressTaken(f"{self.name} said:\n{tail}")
        what = f"does not answer after {self.ready_within:.0f} s" if not in_time else "ended at its start"
        raise EmbeddedError(f"{self.name} {what}; the end of {self.log}:\n{tail}")

    def _tail(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])

    def _set_log_aside(self) -> None:
        if self.log.exists() and self.log.stat().st_size > _LOG_LIMIT:
            self.log.replace(self.log.with_suffix(".log.1"))

    def _reap(self) -> None:
        """Forget the processes of the former start; the guard, which has nothing left to guard, is ended."""
        if (guard := self._own(self._guard)) is not None:
            guard.kill()
            guard.wait()
        self._guard = self._process = None

    def _end_leftovers(self) -> None:
        record = self._read_record()
        left = {row.pid for row in processes.marked(self._mark, self.name)}
        if record is not None and record.server in left:
            if record.owner_birth is not None and processes.birth(record.owner) == record.owner_birth:
                raise EmbeddedError(f"{self._home} is in use by process {record.owner}")
            if not processes.end(self._mark, self.name, [record.server], self.stop_signal, self.stop_within):
                raise EmbeddedError(f"{self.name} process {record.server} of a former run cannot be ended")
        self._kill_orphans()

    def _kill_orphans(self) -> None:
        """End what a server that died alone left behind; otherwise the next one could not use its data."""
        orphans = [row.pid for row in processes.marked(self._mark, self.name)]
        if orphans and not processes.kill(self._mark, self.name, orphans):
            raise EmbeddedError(f"{self.name} processes {orphans} cannot be ended")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._home / f"{self.name}.lock").open("a") as file:
            deadline = time.monotonic() + _LOCK_WITHIN
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise EmbeddedError(f"{self._home} is locked by another process") from None
                    time.sleep(0.05)  # A start takes seconds: looking more often gains nothing.
            yield

    @property
    def _record_file(self) -> Path:
        return self._home / f"{self.name}.pid"

    def _write_record(self, record: _Record) -> None:
        draft = self._record_file.with_suffix(".pid.new")
        draft.write_text(json.dumps(asdict(record)) + "\n")
        draft.replace(self._record_file)

    def _read_record(self) -> _Record | None:
        """The last start's record; it stays after a stop, when no marked process has its number any more."""
        try:
            return _Record(**json.loads(self._record_file.read_text()))
        except (OSError, ValueError, TypeError):
            return None
