"""A sale floor that may be hurt: a Postgres, a Valkey, a provider and the Procfile's processes, all of its own.

    with open_floor(directory, procfile) as floor:          # everything runs
        async with crowd(floor.url, ["sku-1"]) as buyers:        # buyers keep coming, and insist
            floor.kill("charges")                            # hurt something …
            floor.restore()                                  # … and run it again
        await floor.ends_well(buyers)                        # nothing lost, nothing sold or charged twice

The timeouts are a tenth of the real ones, so that recovery takes seconds. Those that decide how soon a lane is served
again (`CALLED_TTL`, `SWEEP_EVERY`, `LOCK_TIMEOUT`, `IDLE_IN_TRANSACTION_TIMEOUT`) are the defaults.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from ops.audit import AuditReport, audit
from ops.embedded import EmbeddedPostgres, EmbeddedValkey
from ops.embedded.ports import free_port
from ops.sandbox import ProviderProcess
from shared.routing import lane_of
from shared.settings import Settings
from shared.states import FINAL
from tests.acceptance.service import API_KEYS, READY_WITHIN, RELEASE_WITHIN, SELLING, Service, is_ready, status_of
from tests.faults.crowd import Crowd
from tests.faults.traps import Trap
from tests.processes.containers import WORKER_READY
from tests.processes.process import OwnedProcess
from tests.processes.procfile import ProcfileStack

#: A call is in doubt 3 s after its claim, its lock is gone after 4 s, "not found" counts after 4 s. A process that
#: decides may stand still for as long as a test on a busy machine lets it; tests of the limit set their own.
FAST = {
    "FAIRLANE_DECIDE_LIMIT": "300",
    "FAIRLANE_LANES": "4",
    "FAIRLANE_START_WITHIN": "1",
    "FAIRLANE_CALL_TIMEOUT": "1.5",
    "FAIRLANE_CALL_MARGIN": "0.5",
    "FAIRLANE_CHARGE_LOCK_TTL": "4",
    "FAIRLANE_SETTLE_WINDOW": "1",
}

#: Everything is final this many seconds after the last fault was taken back, on a busy two-core machine: an unknown
#: call needs about ten, twice that when its second attempt is lost as well.
FINAL_WITHIN = 60.0


@dataclass(frozen=True)
class Ending:
    """How a sale ended, recomputed from the books of Postgres and of the provider."""

    statuses: Counter[str]
    report: AuditReport

    @property
    def confirmed(self) -> int:
        """How many purchases were paid for."""
        return self.statuses["confirmed"]


class Floor:
    """A running sale floor. `postgres`, `valkey`, `provider` and `processes` may be stopped, killed and frozen."""

    def __init__(
        self,
        postgres: EmbeddedPostgres,
        valkey: EmbeddedValkey,
        provider: ProviderProcess,
        processes: ProcfileStack,
        environment: Mapping[str, str],
        logs: Path,
    ) -> None:
        self.postgres = postgres
        self.valkey = valkey
        self.provider = provider
        self.processes = processes
        self.environment = environment
        self.service = Service(processes, environment, valkey, provider, logs)
        #: The line of the Procfile that each process was started from.
        self.lines: dict[str, str] = {}
        self._traps = logs.parent / "traps"

    @property
    def url(self) -> str:
        """The API's base URL."""
        return self.service.url

    def url_of(self, name: str) -> str:
        """The base URL of one API process, which may be a second one with a `FAIRLANE_PORT` of its own."""
        return f"http://127.0.0.1:{self.processes[name].env['FAIRLANE_PORT']}"

    @property
    def settings(self) -> Settings:
        """What the processes run with, without the way through any proxy."""
        values = {name.removeprefix("FAIRLANE_").lower(): value for name, value in self.environment.items()}
        return Settings.model_validate(values)

    def rows(self, statement: str, *values: object) -> list[dict[str, Any]]:
        """What Postgres answers, committed and fresh."""
        return self.service.rows(statement, *values)

    def start(self, line: str, *, name: str | None = None, env: Mapping[str, str] | None = None) -> OwnedProcess:
        """Start a line of the Procfile, under a name of its own if given, and wait until it is ready.

        One that was started before is started again with the environment of its first start and `env`.
        """
        name = name or line
        if name in self.processes:
            process = self.processes[name]
            process.env |= dict(env or {})
            process.start()
        else:
            process = self.processes.start(line, name=name, env=self._with_traps(name) | dict(env or {}))
        self.lines[name] = line
        self.wait_ready([name])
        return process

    def _with_traps(self, name: str) -> dict[str, str]:
        folder = self._traps / name
        folder.mkdir(parents=True, exist_ok=True)
        return {"FAIRLANE_CRASH_AT": f"{folder}/"}

    def trap(self, name: str, point: str, action: str = "kill") -> Trap:
        """From now on, the first process of `name` that passes this crash point dies there, or freezes (`stop`)."""
        return Trap(self._traps / name, point, action)

    def dismiss(self, name: str) -> None:
        """End a process that a test added, with SIGKILL; it is not started again."""
        self.processes[name].kill()
        del self.lines[name]

    def kill(self, name: str) -> None:
        """SIGKILL to every process of the line."""
        process = self.processes[name]
        assert process.alive, f"{name} was dead already"
        process.kill()
        assert not process.alive

    def restore(self, names: Sequence[str] | None = None) -> None:
        """Everything that was started runs again and is ready: servers, provider, processes. No trap is set."""
        if self.postgres.pid is None:
            self.postgres.start()
        if self.valkey.pid is None:
            self.valkey.start()
        if self.provider.pid is None:
            self.provider.start()
        wanted = [name for name in self.lines if names is None or name in names]
        for name in wanted:
            for trap in (self._traps / name).glob("*"):
                trap.unlink()
            process = self.processes[name]
            if process.alive:  # and perhaps stopped, as a whole or one of its children
                process.resume()
            if not process.alive:
                process.start()
        self.wait_ready(wanted)

    def wait_ready(self, names: Sequence[str]) -> None:
        """Return when these processes do their work."""
        for name in names:
            self.processes[name].wait_ready(lambda name=name: self.is_ready(name), READY_WITHIN)  # type: ignore[misc]

    def is_ready(self, name: str) -> bool:
        """Whether this process does its work; it must be alive."""
        line = self.lines[name]
        if line in ("lanes", "charges"):
            return WORKER_READY in self.processes[name].logs_of_run()
        if line == "web":
            return status_of(f"{self.url_of(name)}/readyz") == 200
        return is_ready(self.service, line)

    def put_item(self, sku: str, stock: int, **columns: object) -> None:
        """Create an item, without the API, which may be down just now."""
        values = {"name": sku, "price": 1200, "currency": "EUR", "hold_seconds": 900, **columns}
        names = ", ".join(["sku", "lane", "stock", "available", *values])
        places = ", ".join(["%s"] * (4 + len(values)))
        with psycopg.connect(self.service.database_url) as connection:
            connection.execute(
                f"INSERT INTO fairlane.items ({names}) VALUES ({places})".encode(),
                [sku, lane_of(sku, self.settings.lanes), stock, stock, *values.values()],
            )

    def statuses(self, *skus: str) -> Counter[str]:
        """How many purchases of these items (all, if none is named) are in each status."""
        rows = self.rows(
            "SELECT status, count(*) AS n FROM fairlane.purchases WHERE %s = '{}' OR item = ANY(%s) GROUP BY status",
            list(skus),
            list(skus),
        )
        return Counter({row["status"]: row["n"] for row in rows})

    def posts(self, sku: str) -> dict[str, int]:
        """How many calls the provider has taken for each purchase of this item, answered or not."""
        taken = {}
        for row in self.service.purchases(sku):
            page = f"{self.provider.url}/ledger/posts?reference={row['id']}"
            with urllib.request.urlopen(page, timeout=5) as reply:  # noqa: S310  # the floor's own provider
                taken[row["id"]] = int(json.load(reply)["posts"])
        return taken

    async def ends_well(self, buyers: Crowd, *, within: float = FINAL_WITHIN) -> Ending:
        """Wait until all that was accepted is final, then check every promise; returns how it ended."""
        deadline = time.monotonic() + within
        while set(statuses := self.statuses(*buyers.skus)) - FINAL:
            assert time.monotonic() < deadline, f"not final within {within:g} s: {statuses}"
            await asyncio.sleep(0.1)
        rows = {
            row["idempotency_key"]: row
            for row in self.rows(
                "SELECT idempotency_key, replace(id::text, '-', '') AS id, status, reason, charge_id, quantity, item"
                " FROM fairlane.purchases WHERE item = ANY(%s)",
                buyers.skus,
            )
        }
        lost = {key: id for key, id in buyers.accepted.items() if rows.get(key, {}).get("id") != id}
        assert not lost, f"acknowledged and lost, or under another id: {lost}"
        charged: dict[str, list[str]] = {}
        for charge in self.service.ledger(*(row["id"] for row in rows.values())):
            if charge["status"] == "succeeded":
                charged.setdefault(charge["reference"], []).append(charge["id"])
        confirmed = {row["id"]: [row["charge_id"]] for row in rows.values() if row["status"] == "confirmed"}
        assert charged == confirmed, "the provider's books and ours differ"
        stock = {row["sku"]: row["stock"] for row in self.rows("SELECT sku, stock FROM fairlane.items")}
        sold = Counter[str]()
        for row in rows.values():
            sold[row["item"]] += row["quantity"] if row["status"] == "confirmed" else 0
        assert all(sold[sku] <= stock[sku] for sku in buyers.skus), f"oversold: {sold} of {stock}"
        report = await audit(self.settings)
        assert report.ok, report.findings
        # Nobody's hold is so short that it runs out by itself here.
        winners_lost = [
            row["id"]
            for row in rows.values()
            if row["status"] == "expired" or (row["status"] == "declined" and row["reason"] == "not_charged")
        ]
        assert not winners_lost, f"winners lost to a fault: {winners_lost}"
        return Ending(statuses, report)


@contextmanager
def open_floor(
    directory: Path,
    procfile: Path,
    lines: Sequence[str] = SELLING,
    *,
    per_line: Mapping[str, Mapping[str, str]] | None = None,
    **settings: str,
) -> Iterator[Floor]:
    """Start servers, provider and these lines of the Procfile; end all of them on leaving.

    `settings` are added to the environment of all lines, `per_line` to that of one.
    """
    with ExitStack() as stack:
        postgres = EmbeddedPostgres(directory / "postgres")
        stack.callback(postgres.stop)
        valkey = EmbeddedValkey(directory / "valkey")
        stack.callback(valkey.stop)
        postgres.start()
        valkey.start()
        provider = stack.enter_context(ProviderProcess(directory / "provider"))
        environment = {
            "FAIRLANE_DATABASE_URL": postgres.url.replace("+psycopg", ""),
            "FAIRLANE_REDIS_URL": valkey.url,
            "FAIRLANE_API_KEYS": API_KEYS,
            "FAIRLANE_PAYMENT_URL": provider.url,
            "FAIRLANE_PORT": str(free_port()),
            **FAST,
            **settings,
        }
        logs = directory / "logs"
        processes = stack.enter_context(ProcfileStack(procfile, env=environment, logs=logs))
        processes.run("release", bound=RELEASE_WITHIN)
        floor = Floor(postgres, valkey, provider, processes, environment, logs)
        for line in lines:
            floor.lines[line] = line
            processes.start(line, env=floor._with_traps(line) | dict((per_line or {}).get(line, {})))
        floor.wait_ready(lines)
        yield floor
