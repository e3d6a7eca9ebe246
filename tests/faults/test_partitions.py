"""A process is cut off from Redis or from Postgres while it reaches the other, in the middle of a sale.

Each line of the Procfile has wires of its own: one proxy each to Redis, to the broker (the same Valkey) and to
Postgres. The sweep and the tests themselves have none. A wire is cut (every connection breaks at once) or held (nothing
passes, and nobody hears why). Whatever happens, the sale ends well: all that was accepted is final, nothing is sold or
charged twice, and the audit finds nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.acceptance.service import SELLING
from tests.faults.crowd import Crowd
from tests.faults.floor import Floor, open_floor
from tests.faults.sale import sale
from tests.faults.sale import until as until_within
from tests.processes.proxy import Proxy

#: Seconds in which something happens that must happen, on a busy machine. The longest of the timeouts below is 8 s.
BOUND = 40.0

#: Time enough to charge with every round trip delayed (see the last test), and as little more as possible.
PATIENT = {
    "FAIRLANE_START_WITHIN": "3",
    "FAIRLANE_CALL_TIMEOUT": "3",
    "FAIRLANE_CHARGE_LOCK_TTL": "7",
    # What ends the wait for a server that does not answer.
    "FAIRLANE_STATEMENT_TIMEOUT": "2",
    "FAIRLANE_CONNECTION_TIMEOUT": "3",
    # A child that the time limit ends while its parent looks for the broker can take the parent along: not lightly.
    "FAIRLANE_DECIDE_LIMIT": "8",
}


@dataclass(frozen=True)
class Wires:
    """How the processes of one line reach their servers."""

    redis: Proxy
    broker: Proxy
    postgres: Proxy

    def restore(self) -> None:
        for proxy in (self.redis, self.broker, self.postgres):
            proxy.restore()


class Net:
    """A sale floor whose lines have wires that can be cut."""

    def __init__(self, floor: Floor, stack: ExitStack) -> None:
        self.floor = floor
        self._stack = stack
        self.web = self._wired("web")
        self.lanes = self._wired("lanes")
        self.charges = self._wired("charges")
        floor.processes.start("sweep")
        floor.lines["sweep"] = "sweep"
        floor.wait_ready(SELLING)

    def _wired(self, line: str) -> Wires:
        redis_url, database_url = (self.floor.environment[f"FAIRLANE_{name}_URL"] for name in ("REDIS", "DATABASE"))
        redis, broker, postgres = (
            self._stack.enter_context(Proxy.to(url)) for url in (redis_url, redis_url, database_url)
        )
        env = {
            "FAIRLANE_REDIS_URL": redis.url(redis_url),
            "FAIRLANE_BROKER_URL": broker.url(redis_url),
            "FAIRLANE_DATABASE_URL": postgres.url(database_url),
        }
        self.floor.processes.start(line, env=env)
        self.floor.lines[line] = line
        return Wires(redis, broker, postgres)

    def now(self) -> datetime:
        """Postgres' clock."""
        (row,) = self.floor.rows("SELECT clock_timestamp() AS now")
        now: datetime = row["now"]
        return now

    def count(self, condition: str, *values: object) -> int:
        """How many purchases this is true of."""
        return int(self.floor.rows(f"SELECT count(*) AS n FROM fairlane.purchases WHERE {condition}", *values)[0]["n"])

    def said(self, name: str, words: str) -> int:
        """How often a process has logged this."""
        return self.floor.processes[name].logs_of_run().count(words)

    @asynccontextmanager
    async def sale(self, sku: str) -> AsyncIterator[Crowd]:
        """A sale under way; on leaving, all wires are whole again, and it must end well."""
        async with sale(self.floor, sku) as buyers:
            try:
                yield buyers
            finally:
                for wires in (self.web, self.lanes, self.charges):
                    wires.restore()


async def until(condition: Callable[[], bool], what: str) -> None:
    """The same with the patience of these tests."""
    await until_within(condition, what, BOUND)


@pytest.fixture(scope="module")
def _net(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    directory = tmp_path_factory.mktemp("net")
    with ExitStack() as stack, open_floor(directory, project_root / "Procfile", (), per_line=None, **PATIENT) as floor:
        yield Net(floor, stack)


@pytest.fixture
def net(_net: Net) -> Iterator[Net]:
    _net.floor.restore()
    yield _net
    _net.floor.restore()


async def test_charges_without_redis_send_nothing_without_a_lock(net: Net, sku: str) -> None:
    # The broker is still there: it is called, claims, and cannot take the locks.
    async with net.sale(sku):
        await hurt(net.charges.redis, "cut")
        since = net.now()
        attempts = "SELECT outcome, reason FROM fairlane.charge_attempts WHERE claimed_at > %s AND outcome IS NOT NULL"
        await until(lambda: len(net.floor.rows(attempts, since)) >= 20, "claims that came to nothing")
        outcomes = {(row["outcome"], row["reason"]) for row in net.floor.rows(attempts, since)}
        assert outcomes == {("not_sent", "lock_not_obtained")}
        unpaid = "SELECT purchase_id FROM fairlane.charge_attempts GROUP BY purchase_id HAVING min(claimed_at) > %s"
        references = [row["purchase_id"].hex for row in net.floor.rows(unpaid, since)]
        assert references
        assert net.floor.service.ledger(*references) == []


async def test_charges_without_postgres_keep_their_outcomes(net: Net, sku: str) -> None:
    async with net.sale(sku):
        with paused(net.floor, "sweep"):  # nobody puts anything in doubt, so nothing is asked about
            with net.floor.service.provider_silent():
                # Claimed a moment ago: whoever is cut off from the answer to a claim's commit never calls.
                charging = (
                    "item = %s AND status = 'charging' AND EXISTS (SELECT FROM fairlane.charge_attempts a"
                    " WHERE a.purchase_id = id AND a.claimed_at < clock_timestamp() - interval '0.5 s')"
                )
                await until(lambda: net.count(charging, sku) >= 3, "calls under way")
                held = net.charges.postgres.held
                net.charges.postgres.hold()
                waiting = [
                    row["id"].hex for row in net.floor.rows(f"SELECT id FROM fairlane.purchases WHERE {charging}", sku)
                ]
            await until(lambda: len(net.floor.service.ledger(*waiting)) >= 3, "charges made")
            # On the connection it had, and on a new one.
            failed = net.said("charges", "outcomes_not_recorded")
            await until(lambda: net.said("charges", "outcomes_not_recorded") >= failed + 2, "recordings that failed")
            assert net.charges.postgres.held > held
            charged = {charge["reference"]: charge["id"] for charge in net.floor.service.ledger(*waiting)}
            statuses = "SELECT status, charge_id, attempt FROM fairlane.purchases WHERE id = ANY(CAST(%s AS uuid[]))"
            assert {row["status"] for row in net.floor.rows(statuses, list(charged))} == {"charging"}

            net.charges.postgres.restore()
            ids = list(charged)
            await until(
                lambda: {row["status"] for row in net.floor.rows(statuses, ids)} == {"confirmed"}, "outcomes recorded"
            )
            rows = net.floor.rows(statuses, ids)
            assert {row["charge_id"] for row in rows} == set(charged.values())
            assert {row["attempt"] for row in rows} == {1}


async def test_one_of_two_lane_workers_without_postgres_wedges_nothing_and_writes_nothing_late(
    net: Net, sku: str
) -> None:
    net.floor.start("lanes", name="lanes.2")
    try:
        async with net.sale(sku):
            # It has decided, and holds the lane. Its commit does not arrive before Postgres ended its transaction.
            held = net.lanes.postgres.held
            net.lanes.postgres.hold(is_commit)
            await until(lambda: net.lanes.postgres.held > held, "a decision cut off in its commit")
            since = net.now()
            await until(lambda: net.count("item = %s AND decided_at > %s", sku, since) >= 10, "the other that decides")
            ended = net.said("lanes", "IdleInTransactionSessionTimeout")
            net.lanes.postgres.restore(deliver=True)
            await until(lambda: net.said("lanes", "IdleInTransactionSessionTimeout") > ended, "the held one failing")
    finally:
        net.floor.processes["lanes.2"].stop()
        del net.floor.lines["lanes.2"]


async def test_lanes_without_redis_decide_all_the_same(net: Net, sku: str) -> None:
    async with net.sale(sku):
        await hurt(net.lanes.redis, "cut")
        since = net.now()
        await until(lambda: net.count("item = %s AND decided_at > %s", sku, since) >= 10, "decisions")


async def test_lanes_without_redis_and_broker_come_back_to_what_waits(net: Net, sku: str) -> None:
    async with net.sale(sku):
        net.lanes.redis.cut()
        await hurt(net.lanes.broker, "cut")
        await until(lambda: net.count("item = %s AND status = 'queued'", sku) >= 10, "purchases that wait")


@pytest.mark.parametrize("line", ["lanes", "charges"])
async def test_workers_outlive_their_broker_again_and_again(net: Net, sku: str, line: str) -> None:
    # kombu acknowledges and puts back messages over connections that are gone already; that must not end a worker.
    broker: Proxy = getattr(net, line).broker
    async with net.sale(sku):
        for _ in range(6):
            await hurt(broker, "cut")
            broker.restore()
            calls = net.said(line, "succeeded in")
            await until(lambda calls=calls: net.said(line, "succeeded in") > calls, "a worker that came back")  # type: ignore[misc]


@pytest.mark.parametrize("how", ["cut", "hold"])
async def test_lanes_without_postgres_come_back_to_what_waits(net: Net, sku: str, how: str) -> None:
    postgres = net.lanes.postgres
    async with net.sale(sku):
        replaced = net.said("lanes", "Hard time limit")
        await hurt(postgres, how)
        await until(lambda: net.count("item = %s AND status = 'queued'", sku) >= 10, "purchases that wait")
        if how == "hold":
            # Only its task's time limit ends the wait of a process that gets no answer.
            await until(lambda: net.said("lanes", "Hard time limit") > replaced, "a process that is replaced")


@pytest.mark.parametrize("server", ["redis", "postgres"])
@pytest.mark.parametrize("how", ["cut", "hold"])
async def test_the_door_without_one_of_its_servers_accepts_nothing(net: Net, sku: str, server: str, how: str) -> None:
    proxy: Proxy = getattr(net.web, server)
    async with net.sale(sku) as buyers:
        await hurt(proxy, how)
        status, problem = await buy(net.floor.url, sku, "asked-meanwhile")
        assert (status, problem["type"]) == (503, "/problems/unavailable")
        # Whoever was let in before has heard; from now on nothing is recorded.
        recorded, troubles = net.count("item = %s", sku), buyers.troubles.total()
        await until(lambda: buyers.troubles.total() >= troubles + 10, "buyers who feel it")
        assert net.count("item = %s", sku) == recorded
        assert net.count("idempotency_key = %s AND item = %s", f"asked-meanwhile-{sku}", sku) == 0


async def test_a_slow_network_loses_nothing(net: Net, sku: str) -> None:
    wires = (net.web, net.lanes, net.charges)
    proxies = [proxy for each in wires for proxy in (each.redis, each.broker, each.postgres)]
    async with net.sale(sku):
        before = [proxy.delayed for proxy in proxies]
        for proxy in proxies:
            proxy.delay(0.1)
        since = net.now()
        slow = "item = %s AND accepted_at > %s AND status = 'confirmed'"
        await until(lambda: net.count(slow, sku, since) >= 30, "purchases that are paid for")
        late = [proxy.delayed - number for proxy, number in zip(proxies, before, strict=True)]
        # The door rarely has to call: most calls are out already.
        assert min(number for number, proxy in zip(late, proxies, strict=True) if proxy is not net.web.broker) > 0, late
        assert sum(late) > 500, late


async def hurt(proxy: Proxy, how: str) -> None:
    """Cut or hold this wire; returns when somebody met the fault."""
    before = proxy.refused + proxy.held
    getattr(proxy, how)()
    await until(lambda: proxy.refused + proxy.held > before, f"somebody who finds the wire {how}")


def is_commit(request: bytes) -> bool:
    """As psycopg sends it: a simple query."""
    return request.startswith(b"Q") and b"COMMIT" in request


@contextmanager
def paused(floor: Floor, name: str) -> Iterator[None]:
    """A process stands still."""
    floor.processes[name].pause()
    assert floor.processes[name].paused
    try:
        yield
    finally:
        floor.processes[name].resume()


async def buy(url: str, sku: str, key: str) -> tuple[int, dict[str, Any]]:
    """One request, by somebody who waits as long as it takes."""
    headers = {"Authorization": "Bearer shop-secret", "Idempotency-Key": f"{key}-{sku}"}
    body = {"item": sku, "quantity": 1, "customer": "c-1", "payment_token": "tok_visa"}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=BOUND)) as session,
        session.post(f"{url}/v1/purchases", json=body, headers=headers) as reply,
    ):
        return reply.status, await reply.json(content_type=None)
