"""Where a scenario takes place: servers, a payment provider and lines of the Procfile, new and of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import psycopg
from redis import Redis

from ops import stack
from ops.bench.usage import Processes, Usage, family
from ops.embedded import EmbeddedServers
from ops.embedded.ports import LOOPBACK, free_port
from ops.sandbox import ProviderProcess
from shared.calling import CHARGES_CALL, Caller, lane_call, make_celery
from shared.errors import FairlaneError
from shared.migrate import migrate
from shared.settings import Settings

_FORGET = "TRUNCATE fairlane.charge_attempts, fairlane.purchases, fairlane.purchase_keys, fairlane.items"

#: Processes answer within a few seconds; on a loaded machine with two cores it has taken twenty.
_READY_WITHIN = 60.0
_LOOK_EVERY = 0.02
#: Longer than the stack gives its processes, so that it can end them itself.
_STOP_WITHIN = stack.STOP_WITHIN + 5.0
_STARTED = re.compile(r"\b(\w+) started \(pid (\d+)\)")
_READY = re.compile(r"\b(lanes|charges)@\S+ ready")


class SiteError(FairlaneError):
    """The processes of a scenario did not come up, or one of them ended."""


class Site:
    """A context manager: all is up when it is entered, and nothing is left when it ends.

    `lines` are names of the Procfile's. `latency` is what a payment takes in seconds, or None for no provider.
    """

    def __init__(self, lines: Collection[str] = (), *, latency: float | None = None) -> None:
        self._lines = frozenset(lines)
        self._latency = latency
        self._closing = ExitStack()
        self._stack: subprocess.Popen[bytes] | None = None
        self._holder: psycopg.Connection | None = None
        self.pids: dict[str, int] = {}

    def __enter__(self) -> Site:
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _set_up(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fairlane-bench-"))
        self._closing.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.servers = self._closing.enter_context(EmbeddedServers(self.directory))
        payment_url = f"http://{LOOPBACK}:9"  # nobody listens there, and nobody calls
        self.provider: ProviderProcess | None = None
        if self._latency is not None:
            self.provider = self._closing.enter_context(
                ProviderProcess(self.directory / "provider", latency=self._latency)
            )
            payment_url = self.provider.url
        self.api_key = secrets.token_hex(8)
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        self.environment: Mapping[str, str] = self.servers.environment() | {
            "FAIRLANE_PAYMENT_URL": payment_url,
            "FAIRLANE_API_KEYS": f"bench:{self.api_key}:shop",
            "FAIRLANE_HOST": LOOPBACK,
            "FAIRLANE_PORT": str(port),
            "FAIRLANE_FLOWER_AUTH": "bench:unused",
            # As the bare server that it stands beside. The log's lines would also pass through the processes that run
            # the Procfile here, and those are not what is measured.
            "FAIRLANE_ACCESS_LOG": "false",
        }
        self.settings = Settings.model_validate(
            {name.removeprefix("FAIRLANE_").lower(): value for name, value in self.environment.items()}
        )
        migrate(self.settings)
        self.redis: Redis = Redis.from_url(self.settings.redis_url)
        self._closing.callback(self.redis.close)
        # Whoever watches must cost nothing: by statistics from another moment a look at who is open reads everybody.
        self.connection = psycopg.connect(
            self.libpq_url, autocommit=True, options="-c enable_seqscan=off -c enable_bitmapscan=off"
        )
        self._closing.callback(self.connection.close)
        self._caller = Caller(self.settings, make_celery(self.settings), self.redis)
        if self._lines:
            self._start_lines()

    @property
    def libpq_url(self) -> str:
        """The database's address, as psycopg itself takes it."""
        return self.settings.database_url.replace("postgresql+psycopg://", "postgresql://", 1)

    @property
    def process_environment(self) -> dict[str, str]:
        """What processes of this site are started with; what a person's shell sets for these programs is left out."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FAIRLANE_", "CELERY_"))}
        return kept | dict(self.environment)

    def _start_lines(self) -> None:
        log = self.directory / "processes.log"
        with log.open("wb") as output:
            # It stops when we are gone, as the demo's does. A session of its own: Ctrl-C is for us.
            self._stack = subprocess.Popen(
                [sys.executable, "-m", "ops.stack", "--owned", "--only", *sorted(self._lines)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=stack.find_procfile().directory,
                env=self.process_environment,
                start_new_session=True,
            )
        self._closing.callback(self._stop_lines, self._stack)
        self.wait(lambda: self._lines_are_ready(log), "the processes are up", _READY_WITHIN)

    def _lines_are_ready(self, log: Path) -> bool:
        said = log.read_text(errors="replace")
        self.pids = {name: int(pid) for name, pid in _STARTED.findall(said) if name in self._lines}
        ready = set(_READY.findall(said)) | ({"web"} if "web" in self.pids and self._api_is_ready() else set())
        return self.pids.keys() == self._lines and ready >= self._lines & {"web", "lanes", "charges"}

    def _api_is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2) as response:  # noqa: S310  # our own address
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _stop_lines(self, process: subprocess.Popen[bytes]) -> None:
        # Nothing of a site is kept, so nothing has to be finished.
        for pid in self.pids.values():
            stack.signal_session(pid, signal.SIGKILL)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_WITHIN)
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    # Watching

    def usage(self) -> Usage:
        """Processor time and memory from now on, of the lines, the servers and the provider."""
        named: dict[str, Processes] = {name: partial(family, pid) for name, pid in sorted(self.pids.items())}
        named["postgres"] = partial(family, self.servers.postgres.pid)
        named["valkey"] = partial(family, self.servers.valkey.pid)
        if self.provider is not None and self.provider.pid is not None:
            named["provider"] = partial(family, self.provider.pid)
        return Usage(named)

    @contextmanager
    def only(self, lines: Collection[str]) -> Iterator[Site]:
        """While this lasts, only these lines are awake; afterwards all are, and there are no items and purchases.

        The others are stopped as by Ctrl-Z: to start them anew for each scenario would take most of the time.
        """
        asleep = [process for name, pid in self.pids.items() if name not in lines for process in family(pid)]
        for process in asleep:
            process.suspend()
        try:
            yield self
        finally:
            # Before they wake: what was decided without them is nothing that they should charge now.
            self._forget_sales()
            for process in asleep:
                process.resume()

    def number(self, statement: str, *values: object) -> int:
        """The one number a statement returns."""
        row = self.connection.execute(statement.encode(), values).fetchone()
        return int(row[0] or 0) if row else 0

    def call(self, lanes: Collection[int]) -> None:
        """Call these lanes, as whoever accepts a purchase does."""
        self._caller.call([lane_call(lane) for lane in lanes])

    def call_charges(self) -> None:
        """Call the charge workers, as whoever decides does."""
        self._caller.call([CHARGES_CALL])

    def hold_lane(self, lane: int) -> None:
        """Take a lane, so that nobody decides it, until `let_go`."""
        if self._holder is None:
            self._holder = self._closing.enter_context(psycopg.connect(self.libpq_url))
        self._holder.execute("SELECT FROM fairlane.lanes WHERE lane = %s FOR NO KEY UPDATE", [lane])

    def _forget_sales(self) -> None:
        while True:
            try:
                self.connection.execute(_FORGET)
                return
            except psycopg.errors.DeadlockDetected:
                # With a line that is still at work, a sweep's round for one.
                continue

    def let_go(self) -> None:
        """Give a lane back that was taken."""
        if self._holder is not None:
            self._holder.rollback()

    def wait(
        self, condition: Callable[[], bool], what: str, within: float = 120.0, look_every: float = _LOOK_EVERY
    ) -> None:
        """Wait until this holds. Raises SiteError, saying `what` was waited for, when it does not come to that."""

        def done() -> bool:
            if self._stack is not None and self._stack.poll() is not None:
                log = (self.directory / "processes.log").read_text(errors="replace")
                raise SiteError(f"a process ended, and all with it; their last words:\n{log[-2_000:]}")
            return condition()

        wait_for(done, f"{what}: not within {within:g} s", within, look_every)


def wait_for(
    condition: Callable[[], bool], problem: str, within: float = _READY_WITHIN, look_every: float = _LOOK_EVERY
) -> None:
    """Wait until this holds. Raises SiteError with this problem when it does not come to that."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise SiteError(problem)
        time.sleep(look_every)
