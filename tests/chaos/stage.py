"""A sale floor with two of every worker, wires that can be cut, and somebody who starts again what ended."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

from ops.embedded.ports import free_port
from tests.acceptance.service import READY_WITHIN
from tests.chaos.schedule import PROCESSES, WEB, WIRES, Event
from tests.faults.floor import Floor, open_floor
from tests.processes.process import OwnedProcess, ProcessError, wait_for
from tests.processes.proxy import Proxy

#: Beside the floor's own: what ends the wait for a server that does not answer, and a settle window of 3 s: the
#: provider stands still for up to 2.
SETTINGS = {
    "FAIRLANE_SETTLE_WINDOW": "3",
    "FAIRLANE_STATEMENT_TIMEOUT": "2",
    "FAIRLANE_CONNECTION_TIMEOUT": "3",
    "FAIRLANE_DECIDE_LIMIT": "4",
}
#: What a process says that gives up its start: Postgres is away, or a process of its pool was killed before it was
#: ready. Whatever runs it starts it again, and so do we.
_REFUSES_TO_START = ("FAIRLANE_DATABASE_URL: the database does not answer", "Could not start worker processes")
_LOOK_EVERY = 0.25
#: A log's end that tells why a process ended.
_TAIL = 6_000


class Stage:
    """What the faults are applied to."""

    def __init__(self, floor: Floor, wires: dict[str, Proxy], journal: TextIO) -> None:
        self.floor = floor
        self.wires = wires
        #: One fault at a time has a target in its hands.
        self.hands = {target: threading.Lock() for target in (*PROCESSES, *WIRES, "redis", "postgres", "provider")}
        #: Processes that ended though nobody ended them: name, and the end of its log.
        self.ended_alone: list[tuple[str, str]] = []
        self.starts_refused = 0
        #: Where the API is served.
        self.urls = tuple(floor.url_of(name) for name in WEB)
        #: Set when the time is over: faults end at once.
        self.over = threading.Event()
        self._journal = journal
        self._writing = threading.Lock()
        self._began = time.monotonic()
        self._closed = threading.Event()
        self._runner = threading.Thread(target=self._keep_running, name="runner", daemon=True)

    def process(self, name: str) -> OwnedProcess:
        return self.floor.processes[name]

    def begin(self) -> None:
        """The clock of the schedule starts, and whatever ends is started again."""
        self._began = time.monotonic()
        self._runner.start()

    @property
    def elapsed(self) -> float:
        """Seconds since `begin`."""
        return time.monotonic() - self._began

    def last(self, event: Event) -> None:
        """Return when the fault has lasted long enough."""
        self.over.wait(event.seconds)

    def note(self, what: str, **details: object) -> None:
        """Write a line into the journal of the run."""
        with self._writing:
            self._journal.write(json.dumps({"at": round(self.elapsed, 3), "what": what} | details) + "\n")
            self._journal.flush()

    def members(self, server: str) -> list[psutil.Process]:
        """The processes of a server that runs: itself first, then its children."""
        floor = self.floor
        pid = {"redis": floor.valkey.pid, "postgres": floor.postgres.pid, "provider": floor.provider.pid}[server]
        if pid is None:
            return []
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            return [process, *process.children(recursive=True)]
        return []

    def settle(self) -> None:
        """Take back every fault: all wires whole, everything running and ready. Raises ProcessError if it is not."""
        for wire in self.wires.values():
            wire.restore()
        self.floor.restore([])
        if not wait_for(self._all_ready, READY_WITHIN):
            raise ProcessError(f"not everything runs {READY_WITHIN:g} s after the last fault")

    def _all_ready(self) -> bool:
        return all(self.process(name).alive and self.floor.is_ready(name) for name in PROCESSES)

    def close(self) -> None:
        """Start nothing any more, and let whatever stands still move, so that it can be stopped."""
        self.over.set()
        self._closed.set()
        if self._runner.is_alive():
            self._runner.join()
        for server in ("redis", "postgres", "provider"):
            for process in self.members(server):
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def _keep_running(self) -> None:
        """A process runner that restarts: what ended by itself is noted and started again."""
        while not self._closed.wait(_LOOK_EVERY):
            for name in PROCESSES:
                if self.hands[name].acquire(blocking=False):
                    try:
                        self._restart(name)
                    finally:
                        self.hands[name].release()

    def _restart(self, name: str) -> None:
        process = self.process(name)
        if process.alive:
            return
        said = process.logs_of_run()[-_TAIL:]
        if any(words in said for words in _REFUSES_TO_START):
            self.starts_refused += 1
            self.note("start refused", process=name)
        else:
            self.ended_alone.append((name, said))
            self.note("ended by itself", process=name, said=said)
        process.start()


@contextmanager
def open_stage(directory: Path, procfile: Path) -> Iterator[Stage]:
    """Start everything, ready to sell; end all of it on leaving."""
    with (
        ExitStack() as stack,
        (directory / "faults.jsonl").open("w") as journal,
        open_floor(directory, procfile, (), per_line=None, **SETTINGS) as floor,
    ):
        urls = {
            server: floor.environment[f"FAIRLANE_{name}_URL"]
            for server, name in (("redis", "REDIS"), ("broker", "REDIS"), ("postgres", "DATABASE"))
        }
        wires = {wire: stack.enter_context(Proxy.to(urls[wire.partition(":")[2]])) for wire in WIRES}
        for name, line in PROCESSES.items():
            env = {
                f"FAIRLANE_{'database' if server == 'postgres' else server}_URL".upper(): wires[wire].url(url)
                for server, url in urls.items()
                if (wire := f"{name}:{server}") in wires
            }
            if name == "web.2":
                env["FAIRLANE_PORT"] = str(free_port())
            floor.processes.start(line, name=name, env=env)
            floor.lines[name] = line
        floor.wait_ready(list(PROCESSES))
        opened = Stage(floor, wires, journal)
        try:
            yield opened
        finally:
            opened.close()


def children(process: OwnedProcess) -> list[psutil.Process]:
    """The pool processes of a worker, oldest first."""
    with suppress(psutil.NoSuchProcess):
        return sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    return []
