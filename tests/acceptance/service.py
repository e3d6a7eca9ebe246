"""The whole service as a user runs it: the Procfile's processes, a database, a Valkey and a provider of its own.

A service shares one thing with other tests, the Postgres server of the run, where it has a database for itself. Its
Valkey is its own: the fixture `environment` of the other tests flushes theirs, and a service flushes its own in the
middle of a sale.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row
from redis import Redis

from ops.embedded import EmbeddedServers, EmbeddedValkey
from ops.embedded.ports import free_port
from ops.sandbox import ProviderProcess
from tests.processes.containers import WORKER_READY
from tests.processes.process import wait_for
from tests.processes.procfile import ProcfileStack

API_KEYS = "shop:shop-secret:shop,other:other-secret:shop,admin:admin-secret:admin"
FLOWER_AUTH = "visitor:flower-secret"

#: The Procfile's processes without Flower, which only looks on.
SELLING = ("web", "lanes", "charges", "sweep")

#: Five processes start side by side on two cores: several seconds each, and other tests may run beside.
READY_WITHIN = 60.0
#: A migration of an empty database takes a second or two.
RELEASE_WITHIN = 60.0

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Service:
    """A running service and all its parts. `environment` is what its processes were given."""

    processes: ProcfileStack
    environment: Mapping[str, str]
    valkey: EmbeddedValkey
    provider: ProviderProcess
    logs: Path

    @property
    def url(self) -> str:
        """The API's base URL."""
        return f"http://127.0.0.1:{self.environment['FAIRLANE_PORT']}"

    @property
    def flower_url(self) -> str:
        """Flower's base URL."""
        return f"http://127.0.0.1:{self.environment['FAIRLANE_FLOWER_PORT']}"

    @property
    def database_url(self) -> str:
        """As psycopg takes it."""
        return self.environment["FAIRLANE_DATABASE_URL"]

    def rows(self, statement: str, *values: object) -> list[dict[str, Any]]:
        """What Postgres answers, committed and fresh."""
        with psycopg.connect(self.database_url, row_factory=dict_row) as connection:
            return connection.execute(statement, values).fetchall()

    def purchases(self, sku: str) -> list[dict[str, Any]]:
        """The purchases of an item in the order in which they were accepted."""
        return self.rows(
            "SELECT replace(id::text, '-', '') AS id, seq, idempotency_key, status, reason, quantity, charge_id,"
            " attempt, decided_at FROM fairlane.purchases WHERE item = %s ORDER BY seq",
            sku,
        )

    def ledger(self, *references: str) -> list[dict[str, Any]]:
        """The provider's own books: every charge for these purchases, oldest first."""
        charges = [json.loads(line) for line in self.provider.ledger_file.read_text().splitlines()]
        return [charge for charge in charges if charge["reference"] in references]

    def log_files(self) -> list[Path]:
        """What the processes wrote."""
        return sorted(self.logs.glob("*.log"))

    def redis(self) -> Redis:
        """A client of its Valkey; close it."""
        return Redis.from_url(self.valkey.url)

    @contextmanager
    def provider_silent(self) -> Iterator[None]:
        """Meanwhile the provider takes calls and answers none; afterwards it answers them all. Below CALL_TIMEOUT."""
        pid = self.provider.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def running_service(
    servers: EmbeddedServers,
    directory: Path,
    procfile: Path,
    lines: Sequence[str] = SELLING,
    **settings: str,
) -> Iterator[Service]:
    """Run `release`, then these lines of the Procfile, until all of them are ready; end them all on leaving.

    `settings` are added to the environment: `FAIRLANE_DELIVERY="purchase"`. Raises ProcessError when one does not come
    up, with the end of its log.
    """
    with (
        empty_database(servers) as database_url,
        embedded_valkey(directory) as valkey,
        ProviderProcess(directory / "provider") as provider,
    ):
        environment = {
            "FAIRLANE_DATABASE_URL": database_url,
            "FAIRLANE_REDIS_URL": valkey.url,
            "FAIRLANE_API_KEYS": API_KEYS,
            "FAIRLANE_PAYMENT_URL": provider.url,
            "FAIRLANE_PORT": str(free_port()),
            "FAIRLANE_FLOWER_PORT": str(free_port()),
            "FAIRLANE_FLOWER_AUTH": FLOWER_AUTH,
        } | settings
        logs = directory / "logs"
        with ProcfileStack(procfile, env=environment, logs=logs) as processes:
            processes.run("release", bound=RELEASE_WITHIN)
            service = Service(processes, environment, valkey, provider, logs)
            for line in lines:
                processes.start(line)
            for line in lines:
                processes[line].wait_ready(lambda line=line: is_ready(service, line), READY_WITHIN)  # type: ignore[misc]
            yield service


def is_ready(service: Service, line: str) -> bool:
    """Whether the process of a Procfile line does its work."""
    match line:
        case "web":
            return status_of(f"{service.url}/readyz") == 200
        case "flower":
            # Without the password: that it is asked for is answer enough.
            return status_of(f"{service.flower_url}/api/workers") == 401
        case "lanes" | "charges":
            return WORKER_READY in service.processes[line].logs_of_run()
        case _:
            return True


def status_of(url: str) -> int | None:
    """The status of a GET, None while nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310  # a URL of this test
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


@contextmanager
def empty_database(servers: EmbeddedServers) -> Iterator[str]:
    """The URL of a new, empty database on the run's Postgres, dropped afterwards."""
    server = servers.postgres.url.replace("+psycopg", "").rpartition("/")[0]
    name = f"acceptance_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        yield f"{server}/{name}"
    finally:
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def embedded_valkey(directory: Path) -> Iterator[EmbeddedValkey]:
    """A Valkey of its own, below `directory`."""
    valkey = EmbeddedValkey(directory / "valkey")
    valkey.start()
    try:
        yield valkey
    finally:
        valkey.stop()


def eventually(condition: Any, bound: float, what: str) -> None:
    """Wait until `condition()` holds; fails with `what` after `bound` seconds."""
    assert wait_for(condition, bound), f"not within {bound:g} s: {what}"
