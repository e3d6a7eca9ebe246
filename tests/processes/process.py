"""One command as a child process that the test owns.

The child leads a session and a process group of its own. So a signal reaches all it started (Celery's pool
processes, say), and a Ctrl-C at the terminal reaches only the test run, which then ends the child in order.
A descendant that itself calls ``setsid`` (a daemon) leaves the session and is out of reach here.

    with OwnedProcess(["celery", "-A", "workers.app", "worker"], log=tmp_path / "worker.log") as worker:
        worker.wait_ready(lambda: "ready." in worker.logs_of_run(), bound=30)
        worker.kill()
        worker.restart()

The first process of the session is reaped last, when the others are gone. Until then its id cannot be given
to a stranger, so a late signal cannot hit one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

# Conditions are asked 50 times a second: far below what a test notices, and a small load on two cores.
POLL_SECONDS = 0.02
# A process on a busy two-core machine needs several seconds to import Celery or FastAPI; 30 leaves room.
READY_SECONDS = 30.0
# A worker told to stop first ends its payment calls, which last up to 10 s; 15 leaves room to record them.
STOP_SECONDS = 15.0
# SIGKILL, SIGSTOP and SIGCONT need no help from the process; only one stuck in a device outlives this bound.
SIGNAL_SECONDS = 5.0
# What a developer's shell sets for these programs must not reach the processes under test.
FOREIGN_PREFIXES = ("FAIRLANE_", "CELERY_")


class ProcessError(AssertionError):
    """An owned process did not do what the test needs of it. Ends with the tail of its log."""


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without the settings of the programs under test, and with `extra`.

    The directory of the running interpreter comes first on PATH, so that ``celery`` and ``fairlane`` are the
    ones installed beside it. Output is unbuffered, so that a log line can be waited for.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"
    return env | dict(extra or {})


def wait_for(condition: Callable[[], bool], bound: float) -> bool:
    """Ask until `condition` holds or `bound` seconds passed; it is asked once more at the end."""
    deadline = time.monotonic() + bound
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(POLL_SECONDS)
    return condition()


class OwnedProcess:
    """A command, run as a child in its own session, any number of times one after the other.

    `env` is added to `child_environment()`. All runs append their output to `log`. States: not started,
    running (perhaps paused), exited. Use it as a context manager; when a test forgets, the child ends with
    this object or, at the latest, with the interpreter.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        name: str | None = None,
    ) -> None:
        self.argv = tuple(argv)
        self.log = log
        self.env = child_environment(env)
        self.cwd = cwd
        self.name = name or Path(self.argv[0]).name
        self._child: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None
        self._run_offset = 0

    def start(self) -> Self:
        """Start a run. Raises ProcessError when one is going on, OSError when the command cannot be run."""
        if self.alive:
            raise ProcessError(f"{self.name} is already running as {self.pid}")
        self._end()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._run_offset = output.seek(0, os.SEEK_END)
            self._child = subprocess.Popen(
                self.argv,
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end_session, self._child, os.getpid())
        return self

    @property
    def pid(self) -> int:
        """Id of the latest run's first process; also the id of its group and session."""
        return self._started().pid

    @property
    def alive(self) -> bool:
        """True from start until the first process exits, whether it is paused or not."""
        return self._child is not None and self._child.returncode is None and not _is_zombie(self._child.pid)

    @property
    def paused(self) -> bool:
        """True while every process of the run is stopped by a signal."""
        states = [member.status() for member in session_members(self.pid)] if self.alive else []
        return bool(states) and all(state == psutil.STATUS_STOPPED for state in states)

    @property
    def exit_code(self) -> int | None:
        """The latest run's exit code, negative for a signal; None until stopped, killed or waited for."""
        return None if self._child is None else self._child.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the first process alone, as a container engine does. No effect once it exited."""
        if self.alive:
            os.kill(self.pid, number)

    def wait_ready(self, condition: Callable[[], bool], bound: float = READY_SECONDS) -> Self:
        """Wait until `condition` holds. Raises ProcessError if the process exits, or after `bound` s."""
        if not wait_for(lambda: not self.alive or condition(), bound):
            raise self._error(f"was not ready within {bound:g} s")
        if not self.alive:
            raise self._error("exited before it was ready")
        return self

    def wait_exit(self, bound: float) -> int:
        """Wait until the process exits by itself, end what it left behind, and return its exit code."""
        if not wait_for(lambda: not self.alive, bound):
            raise self._error(f"did not exit within {bound:g} s")
        return self.kill()

    def terminate(self) -> None:
        """Ask the first process to end, without waiting. A paused run is resumed, to see the SIGTERM."""
        self.send_signal(signal.SIGTERM)
        self._signal_group(signal.SIGCONT)

    def stop(self, bound: float = STOP_SECONDS) -> int:
        """SIGTERM to the first process; after `bound` seconds, or when it exited, SIGKILL to what remains.

        Only the first process is asked: Celery's pool processes die of a SIGTERM in the middle of a task, but
        their parent lets them finish. Returns the exit code.
        """
        self.terminate()
        return self.finish(bound)

    def finish(self, bound: float = STOP_SECONDS) -> int:
        """Wait up to `bound` seconds for the end that `terminate` asked for, then SIGKILL to what remains.

        It does not ask again: a second SIGTERM kills a Python program in the middle of its orderly exit.
        """
        wait_for(lambda: not self.alive, bound)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL to every process of the run; returns the exit code when all are gone. May be repeated."""
        child = self._started()
        self._end()
        if child.returncode is None:
            raise self._error("outlived SIGKILL")
        return child.returncode

    def pause(self) -> None:
        """SIGSTOP to the whole group; returns when every process has stopped."""
        self._signal_group(signal.SIGSTOP)
        if not wait_for(lambda: self.paused, SIGNAL_SECONDS):
            raise self._error("could not be paused")

    def resume(self) -> None:
        """SIGCONT to the whole group; returns when it is no longer paused."""
        self._signal_group(signal.SIGCONT)
        if not wait_for(lambda: not self.paused, SIGNAL_SECONDS):
            raise self._error("could not be resumed")

    def restart(self, bound: float = STOP_SECONDS) -> Self:
        """Stop what still runs and start again: same command, environment, directory and log."""
        if self._child is not None:
            self.stop(bound)
        return self.start()

    def logs(self) -> str:
        """Everything all runs wrote."""
        return self._read(0)

    def logs_of_run(self) -> str:
        """What the latest run wrote: an earlier run's "ready" does not count for this one."""
        return self._read(self._run_offset)

    def __enter__(self) -> Self:
        return self if self.alive else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            self.stop()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            raise ProcessError(f"{self.name} was never started")
        return self._child

    def _signal_group(self, number: int) -> None:
        if self.alive:
            os.killpg(self.pid, number)

    def _read(self, offset: int) -> str:
        if not self.log.exists():
            return ""
        with self.log.open("rb") as written:
            written.seek(offset)
            return written.read().decode(errors="replace")

    def _error(self, what: str) -> ProcessError:
        tail = "\n".join(self.logs_of_run().splitlines()[-30:])
        return ProcessError(f"{self.name} {what}; its log ends:\n{tail}")


def session_members(session: int) -> list[psutil.Process]:
    """The living processes of a session; zombies, which only wait for a parent, are not counted."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def processes_for(directory: Path) -> list[str]:
    """Living processes that were started in, with or for `directory`, by id and command.

    Looks at working directories, commands and environments, so it also finds those that left their session.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            words = [process.cwd(), *process.cmdline(), *process.environ().values()]
            if any(str(directory) in word for word in words):
                found.append(f"{process.pid} {process.cmdline()}")
    return found


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _end_session(child: subprocess.Popen[bytes], owner: int) -> None:
    """SIGKILL every process of the child's session, then reap the child.

    In a fork of the test run this does nothing: the copy of the object there owns no process.
    """
    if os.getpid() != owner or child.returncode is not None:
        return
    with contextlib.suppress(PermissionError):  # what macOS answers for a group of zombies
        os.killpg(child.pid, signal.SIGKILL)

    def gone() -> bool:
        members = session_members(child.pid)
        for member in members:  # those that moved to another group, or were forked meanwhile
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
        return not members

    if wait_for(gone, SIGNAL_SECONDS):
        child.wait()
