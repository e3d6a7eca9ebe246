"""Which processes belong to an embedded server, and how they are ended.

A server carries a *mark* in its command line (see `mark_of`), and so do its children. A process id alone
says nothing: the number may have passed on to a stranger. Nothing is signalled that does not carry the
mark, save the children of a process that does.

The file is also a program, the *guard*: a small process beside each server that ends the server when its
owner is gone. The kernel's own means, PR_SET_PDEATHSIG, does not serve: it is lost when the server changes
its user, and it fires when the *thread* that started the server ends. The guard only compares its parent's
process id, so it survives both. It imports nothing outside the standard library, to start in a few
milliseconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_POLL = 0.02  # Seconds between two looks at the process table: a look costs milliseconds, a stop takes tens.
_GUARD_POLL = 0.5  # Seconds: long enough to cost nothing in a measurement, short enough for a person to wait.
_KILL_WITHIN = 10.0  # Seconds for a killed process to vanish: only a process stuck in disk I/O takes longer.


@dataclass(frozen=True)
class Process:
    """One row of the process table. Zombies are not listed: they run no more."""

    pid: int
    parent: int
    name: str
    command: str


def mark_of(directory: Path) -> str:
    """Return the word that a server on `directory` carries in its command line: 25 safe characters."""
    return "fairlane-" + hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]


def table() -> list[Process]:
    """Return all running processes that this user may see."""
    if not (_PROC / "self" / "stat").exists():
        return _table_from_ps()
    rows = (_from_proc(int(entry)) for entry in os.listdir(_PROC) if entry.isdigit())  # noqa: PTH208 - Path objects for nothing
    return [row for row in rows if row is not None]


def marked(mark: str, name: str) -> list[Process]:
    """Return the running processes called `name` that carry `mark`."""
    return [row for row in table() if row.name == name and mark in row.command]


def birth(pid: int) -> str | None:
    """Return when process `pid` started, as an opaque text, or None if it does not run.

    A process id with its birth names one process for good, while the id alone is used again.
    """
    if (_PROC / "self" / "stat").exists():
        fields = _stat(pid)
        return None if fields is None else fields[1][19]
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return shown.stdout.strip() or None


def wait_until(done: Callable[[], bool], within: float) -> bool:
    """Wait up to `within` seconds for `done`; return its last answer."""
    deadline = time.monotonic() + within
    while not done():
        if time.monotonic() > deadline:
            return done()
        time.sleep(_POLL)
    return True


def end(mark: str, name: str, roots: Iterable[int], stop: signal.Signals, within: float) -> bool:
    """End the marked servers `roots` and their children: `stop` first, SIGKILL after `within` seconds.

    For processes that are not this process's own children. Returns whether all are gone.
    """
    pids = {row.pid for row in marked(mark, name)} & set(roots)
    for pid in pids:
        send(pid, stop)
    if wait_until(lambda: not pids & {row.pid for row in marked(mark, name)}, within):
        return True
    return kill(mark, name, pids)


def kill(mark: str, name: str, roots: Iterable[int]) -> bool:
    """SIGKILL the marked servers `roots` and their children. Returns whether all are gone.

    A server could fork a new child between the look at the table and its end, so it is frozen first.
    """
    servers = {row.pid for row in marked(mark, name)} & set(roots)
    for pid in servers:
        send(pid, signal.SIGSTOP)
    members = servers | {row.pid for row in table() if row.parent in servers}
    for pid in members:
        send(pid, signal.SIGKILL)
    return wait_until(lambda: not members & {row.pid for row in table()}, _KILL_WITHIN)


def start_guard(server: int, mark: str, name: str, stop: signal.Signals, within: float) -> subprocess.Popen[bytes]:
    """Start the guard of `server`. It lives until killed, or until this process and the server are gone."""
    arguments = [str(os.getpid()), str(server), mark, name, str(int(stop)), str(within)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal; a process that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _stat(pid: int) -> tuple[str, list[str]] | None:
    """Return name and fields (from the state on) of /proc/PID/stat, see proc(5); None if gone or a zombie."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else (text[text.index("(") + 1 : text.rindex(")")], fields)


def _from_proc(pid: int) -> Process | None:
    stat = _stat(pid)
    if stat is None:
        return None
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    name, fields = stat
    return Process(pid, int(fields[1]), name, raw.replace(b"\0", b" ").decode(errors="replace"))


def _table_from_ps() -> list[Process]:
    """The same table where there is no /proc (macOS)."""
    shown = subprocess.run(
        ["ps", "-axww", "-o", "pid=,ppid=,stat=,ucomm=,command="], capture_output=True, text=True, check=True
    )
    rows = (line.split(None, 4) for line in shown.stdout.splitlines())
    return [
        Process(int(row[0]), int(row[1]), row[3], row[4])
        for row in rows
        if len(row) == 5 and not row[2].startswith("Z")
    ]


def _guard(owner: int, server: int, mark: str, name: str, stop: signal.Signals, within: float) -> None:
    while os.getppid() == owner:
        time.sleep(_GUARD_POLL)
    end(mark, name, [server], stop, within)


if __name__ == "__main__":
    _owner, _server, _mark, _name, _stop, _within = sys.argv[1:]
    _guard(int(_owner), int(_server), _mark, _name, signal.Signals(int(_stop)), float(_within))
