"""Running the Procfile: every line as one process, and all of them stopped together.

Processes, prefixes and colours are honcho's; the loop is ours, because honcho's gives processes five seconds to end,
sends SIGTERM to Celery's pool processes too (who then die in the middle of a decision, while their parent would let
them finish), and knows nothing of a starter that was killed.

    start ─▶ run ─▶ one ended, or Ctrl-C, SIGTERM, the starter is gone
                      └─▶ SIGTERM to each line's process ─▶ (bound) ─▶ SIGKILL to what is left of its session

Each line has a session of its own. Beside it stands a watcher, a process that carries its output to us. It ends what a
line leaves behind in its session, and the whole session when this process is gone, whatever killed it.

`python -m ops.stack [--owned] [--only LINE …]` runs it alone: with `--owned` it also stops when standard input ends.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import shlex
import signal
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from honcho.colour import get_colours
from honcho.environ import parse_procfile
from honcho.printer import Message, Printer
from honcho.process import Process

from shared.errors import FairlaneError, SettingsError
from shared.settings import Settings, load_settings

#: What the lines together cannot do without; asked for before anything starts.
NEEDED = ("api_keys", "payment_url", "flower_auth")

RELEASE = "release"
"""The line that runs first, once, and must succeed."""

#: From SIGTERM to SIGKILL. A payment call may take 10 s and its outcome must still be recorded.
STOP_WITHIN = 20.0

#: How often a watcher looks whether its line or its starter has ended. A person waits for the result.
_LOOK_EVERY = 0.25
#: What a line's process leaves behind in its session gets this long to end by itself before SIGKILL.
_LEFTOVERS_WITHIN = 2.0


@dataclass(frozen=True, slots=True)
class Procfile:
    """The lines of a Procfile by name, and the directory they run in."""

    directory: Path
    lines: Mapping[str, str]


def find_procfile() -> Procfile:
    """The Procfile beside the packages, as in a checkout; else the working directory's.

    Raises SettingsError when there is none, or none with lines.
    """
    beside = Path(__file__).resolve().parents[1] / "Procfile"
    path = beside if beside.is_file() else Path.cwd() / "Procfile"
    try:
        lines = dict(parse_procfile(path.read_text(encoding="utf-8")).processes)
    except FileNotFoundError:
        raise SettingsError(f"no Procfile beside the installed packages and none in {path.parent}") from None
    except (OSError, UnicodeDecodeError, AssertionError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    if not lines:
        raise SettingsError(f"{path} has no lines")
    return Procfile(path.parent, lines)


def process_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for the lines: the programs beside this interpreter first on PATH, output unbuffered."""
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join([programs, environment.get("PATH", os.defpath)])
    return {**environment, "PATH": path, "PYTHONUNBUFFERED": "1"}


def up(environment: Mapping[str, str], only: Collection[str] | None = None) -> int:
    """Run the release line, then all others, or `only` those of these names, until they end; returns the exit code.

    That of the line that ended first (1 for a line that ended without an error: no line is meant to end), 130 after
    Ctrl-C, 143 after SIGTERM. Call it in the main thread. Signals are handled here; the former handlers are put back.
    """
    procfile = find_procfile()
    with _Stop() as stop:
        lines = dict(procfile.lines)
        release = lines.pop(RELEASE, None)
        if release is not None:
            code = _run({RELEASE: release}, procfile.directory, environment, stop)
            if code != 0:
                return code
        if only is not None:
            lines = {name: line for name, line in lines.items() if name in only}
        return _run(lines, procfile.directory, environment, stop) or 1


class _Stop:
    """Whether to stop, and why, as an exit code; set by SIGINT and SIGTERM while entered, or by `request`."""

    def __init__(self) -> None:
        self.code: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def request(self, code: int) -> None:
        self.code = self.code or code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(128 + number)

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


_OWNER_GONE = threading.Event()


class _WatchedProcess(Process):  # type: ignore[misc]  # honcho has no types
    """One line, run and watched in a process of its own (see the module)."""

    def run(self, events: Any = None, ignore_signals: bool = False) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            # Ctrl-C reaches us too. Not SIG_IGN, which the line's program would inherit; honcho sets that after it.
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()
        super().run(events, ignore_signals)
        signal_session(self._child.pid, signal.SIGKILL)

    def _watch(self, starter: int) -> None:
        while self._child is None:
            time.sleep(_LOOK_EVERY)
        pid = self._child.pid
        while not (ended := _has_ended(pid)) and os.getppid() == starter:
            time.sleep(_LOOK_EVERY)
        within = _LEFTOVERS_WITHIN if ended else STOP_WITHIN
        if not ended:
            _signal_process(pid, signal.SIGTERM)
        # Output ends when everybody in the session has closed it; then `run` returns, and this thread ends with it.
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY)
        signal_session(pid, signal.SIGKILL)


@dataclass(slots=True)
class _Line:
    """A line as the loop sees it. `pid` is known once it started, `code` once it and its output ended."""

    watcher: multiprocessing.Process
    colour: str
    pid: int | None = None
    code: int | None = None
    told: set[signal.Signals] = field(default_factory=set)


def _run(lines: Mapping[str, str], directory: Path, environment: Mapping[str, str], stop: _Stop) -> int:
    """Run these lines until the first of them ends or `stop` says so, then stop them all; returns the exit code."""
    events: multiprocessing.Queue[Any] = multiprocessing.Queue()
    printer = Printer(sys.stdout, width=max(len(name) for name in (*lines, "system")))
    colours = get_colours()
    running: dict[str, _Line] = {}
    for name, command in lines.items():
        colour = next(colours)
        process = _WatchedProcess(
            _as_one_process(command),
            name=name,
            colour=colour,
            env=process_environment(environment),
            cwd=str(directory),
        )
        running[name] = _Line(multiprocessing.Process(target=process.run, args=(events, True), name=name), colour)
    for line in running.values():
        line.watcher.start()

    first: int | None = None
    kill_at: float | None = None
    try:
        while any(line.code is None for line in running.values()):
            with suppress(queue.Empty):
                first = _take(events.get(timeout=0.1), running, printer, first)
            for name, line in running.items():
                if line.code is None and not line.watcher.is_alive() and events.empty():
                    _say(printer, f"the watcher of {name} ended")
                    line.code = 1
                    first = 1 if first is None else first
            if _OWNER_GONE.is_set():
                stop.request(128 + signal.SIGTERM)
            if kill_at is None and (stop.code is not None or first is not None):
                kill_at = time.monotonic() + STOP_WITHIN
                if stop.code is not None:
                    _say(printer, "stopping")
            if kill_at is not None:
                _end(running, signal.SIGKILL if time.monotonic() > kill_at else signal.SIGTERM)
                if time.monotonic() > kill_at + _LEFTOVERS_WITHIN:
                    break  # Somebody left the session and holds the output open: nothing to wait for.
    finally:
        _end(running, signal.SIGKILL)
        for line in running.values():
            line.watcher.join(_LEFTOVERS_WITHIN)
            line.watcher.kill()
    if stop.code is not None:
        return stop.code
    # A line ended by signal n is reported as -n; a shell would say 128 + n.
    return first if first is not None and first >= 0 else 128 - (first or 0)


def _take(message: Any, running: dict[str, _Line], printer: Printer, first: int | None) -> int | None:
    """Handle one message of a watcher; returns the exit code of the line that ended first, once one has."""
    line = running[message.name]
    if message.type == "start":
        line.pid = message.data["pid"]
        _say(printer, f"{message.name} started (pid {line.pid})")
    elif message.type == "stop":
        line.code = message.data["returncode"]
        _say(printer, f"{message.name} ended with {line.code}")
        return line.code if first is None else first
    else:
        printer.write(message)
    return first


def _end(running: Mapping[str, _Line], number: signal.Signals) -> None:
    """Signal every line that still runs, each only once; also those that started after the last call."""
    for line in running.values():
        if line.pid is None or line.code is not None or number in line.told:
            continue
        line.told.add(number)
        if number is signal.SIGKILL:
            signal_session(line.pid, number)
        else:
            _signal_process(line.pid, number)


def _say(printer: Printer, words: str) -> None:
    printer.write(Message("line", words, datetime.now().astimezone(), "system", None))


def _as_one_process(line: str) -> str:
    """The line such that its program takes the shell's place, so that signals reach it and not a shell.

    `env` takes the assignments a line may begin with. A line of several commands is left to the shell.
    """
    tokens = list(shlex.shlex(line, posix=True, punctuation_chars=True))
    several = any(token and set(token) <= set(";&|()<>") for token in tokens)
    return line if several else f"exec env {line}"


def _has_ended(pid: int) -> bool:
    """Whether a child of this process has ended; leaves it to be waited for, so its number is not used again."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _signal_process(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def signal_session(pid: int, number: signal.Signals) -> None:
    """Signal a line and all that it started; nothing where they have ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def checked_settings() -> Settings:
    """The settings, complete for every line; SettingsError names the first that is missing."""
    return load_settings(*NEEDED)


def _watch_owner() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    _OWNER_GONE.set()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ops.stack`; see the module. 2 with one line on stderr for settings that cannot work."""
    parser = argparse.ArgumentParser(prog="python -m ops.stack", description="Run every line of the Procfile.")
    parser.add_argument("--owned", action="store_true", help="stop when standard input ends: the starter died")
    parser.add_argument("--only", nargs="+", metavar="LINE", help="beside the release line, run only these")
    wanted = parser.parse_args(arguments)
    if wanted.owned:
        threading.Thread(target=_watch_owner, daemon=True).start()
    try:
        checked_settings()
        return up(os.environ, wanted.only)
    except FairlaneError as error:
        print(f"fairlane: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
