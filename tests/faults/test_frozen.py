"""Processes that stand still in the middle of what they do, for longer than every timeout, and then go on.

Each is stopped at a crash point (SIGSTOP to itself) or from outside, while a sale goes on with the others. What it had
in its hands is finished by them; awake again, it changes nothing that is settled and charges nobody.

The crew of this module is two of each process and more of those that can be stopped in many places, so that several
stand still side by side.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import aiohttp
import pytest

from ops.embedded.ports import free_port
from shared.states import FINAL
from tests.faults.crowd import Crowd, crowd
from tests.faults.floor import FINAL_WITHIN, Floor
from tests.faults.traps import Trap

#: Who works beside the four processes of the floor.
CREW = {
    "web.2": "web",
    "lanes.2": "lanes",
    "charges.2": "charges",
    "charges.3": "charges",
    "charges.4": "charges",
    "charges.5": "charges",
    "charges.6": "charges",
    "sweep.2": "sweep",
    "sweep.3": "sweep",
}
#: More than anybody buys here: who is accepted must get it.
STOCK = 1_000
#: Buyers per second, until everybody stands still who is to.
RATE = 10.0
#: Seconds in which something happens that must happen.
BOUND = 40.0
#: A call lasts `CALL_TIMEOUT`, 1.5 s: on a busy machine it may be over before its worker is stopped.
TRIES = 5
#: Longer than every timeout of the floor's settings: a frozen transaction ends after 2 s, a call is in doubt after 3,
#: its lock gone after 4, and "not found" counts after 4.
LONGER_THAN_ALL = 5.0
#: What Postgres says of a transaction whose process stood still in it (idle_in_transaction_session_timeout).
LOST_ITS_TRANSACTION = "25P03"

# Ten processes are started for this module, while others may run beside it.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def _crew(_floor: Floor) -> Iterator[None]:
    def start(name: str) -> None:
        # Two workers of one line have one name among Celery's nodes, which nobody asks for here.
        env = {"FAIRLANE_PORT": str(free_port())} if CREW[name] == "web" else {}
        _floor.start(CREW[name], name=name, env=env)

    with ThreadPoolExecutor() as starting:
        list(starting.map(start, CREW))
    yield
    for name in CREW:
        _floor.dismiss(name)


@pytest.fixture
def crew(_crew: None, floor: Floor) -> Floor:
    """The floor with everybody on it awake."""
    return floor


async def until(condition: Callable[[], bool], what: str, within: float = BOUND) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.05)


def books(crew: Floor, *skus: str) -> list[dict[str, Any]]:
    """All that may not change any more once everything is final."""
    return [
        *crew.rows("SELECT * FROM fairlane.purchases WHERE item = ANY(%s) ORDER BY seq", list(skus)),
        *crew.rows(
            "SELECT sku, stock, available, unpaid FROM fairlane.items WHERE sku = ANY(%s) ORDER BY sku", list(skus)
        ),
    ]


def is_idle(crew: Floor, name: str) -> bool:
    """Whether a worker has ended every task that it took since it was started."""
    said = crew.processes[name].logs_of_run()
    taken = set(re.findall(r"Task \S+\[([\w-]+)\] received", said))
    ended = set(re.findall(r"Task \S+\[([\w-]+)\] (?:succeeded|raised)", said))
    return taken <= ended


async def feed_until_they_stand_still(crew: Floor, sku: str, traps: Collection[Trap], **kinds: Any) -> Crowd:
    """Buyers come one after another until every trap is sprung; returns them, all answered."""
    async with crowd(crew.url, [sku], rate=RATE, **kinds) as buyers:
        for trap in traps:
            await trap.springs(BOUND)
    return buyers


async def whoever_comes_first(crew: Floor, names: Collection[str], point: str) -> dict[str, Trap]:
    """Stop one of these at this point, whoever gets there first (perhaps two at once); by their names."""
    traps = {name: crew.trap(name, point, "stop") for name in names}
    await until(lambda: any(trap.sprung for trap in traps.values()), f"somebody caught at {point}")
    for trap in traps.values():
        trap.take_back()
    return {name: trap for name, trap in traps.items() if trap.pid is not None}


async def all_are_final_without(crew: Floor, sku: str, traps: Collection[Trap]) -> None:
    """Return when all is over though these processes still stand still, and have for long enough."""
    stood_still_since = max(trap.sprung_at for trap in traps)
    await until(lambda: not set(crew.statuses(sku)) - FINAL, f"an end: {crew.statuses(sku)}", FINAL_WITHIN)
    await asyncio.sleep(stood_still_since + LONGER_THAN_ALL - time.time())  # the fault is that it lasts
    assert all(trap.sprung for trap in traps)


async def test_an_api_process_frozen_in_its_transaction_and_after_its_commit(crew: Floor, sku: str) -> None:
    crew.put_item(sku, STOCK)
    async with crowd(crew.url, [sku], limit=0) as buyers, aiohttp.ClientSession() as session:

        async def ask(name: str, key: str) -> tuple[int, dict[str, Any], bool]:
            order = {"item": sku, "quantity": 1, "customer": "c-1", "payment_token": "tok_visa"}
            headers = {"Authorization": "Bearer shop-secret", "Idempotency-Key": key}
            async with session.post(f"{crew.url_of(name)}/v1/purchases", json=order, headers=headers) as reply:
                return reply.status, await reply.json(content_type=None), "Idempotent-Replayed" in reply.headers

        async def insist(name: str, key: str) -> tuple[dict[str, Any], bool]:
            deadline = time.monotonic() + BOUND
            while (answer := await ask(name, key))[0] not in (200, 202):
                assert answer[0] == 503, answer
                assert time.monotonic() < deadline
            return answer[1:]

        # web stands still in its transaction, which Postgres ends; web.2 then takes the order as new.
        in_transaction = crew.trap("web", "accept.before_commit", "stop")
        first = asyncio.create_task(ask("web", "key-1"))
        await in_transaction.springs()
        told, replayed = await insist("web.2", "key-1")
        assert not replayed
        buyers.accepted["key-1"] = told["id"]
        await all_are_final_without(crew, sku, [in_transaction])
        in_transaction.let_go()
        assert (await first)[0] == 503
        assert LOST_ITS_TRANSACTION in crew.processes["web"].logs_of_run()
        # web.2 stands still after its commit: nobody is told and no lane is called, but the order is there.
        after_commit = crew.trap("web.2", "accept.after_commit", "stop")
        second = asyncio.create_task(ask("web.2", "key-2"))
        await after_commit.springs()
        told, replayed = await insist("web", "key-2")
        assert replayed
        buyers.accepted["key-2"] = told["id"]
        await all_are_final_without(crew, sku, [after_commit])
        before = books(crew, sku)
        after_commit.let_go()
        status, told, _ = await second
        assert (status, told["id"]) == (202, buyers.accepted["key-2"])
        assert (await crew.ends_well(buyers)).confirmed == 2
        assert books(crew, sku) == before


async def test_children_frozen_in_the_middle_of_their_lane(crew: Floor, sku: str) -> None:
    crew.put_item(sku, STOCK)
    traps = {
        point: crew.trap("lanes", point, "stop")
        for point in ("decide.after_lock", "decide.before_commit", "decide.after_commit")
    }
    buyers = await feed_until_they_stand_still(crew, sku, traps.values())
    assert len({trap.pid for trap in traps.values()}) == 3, "three children, each in its own place"
    await all_are_final_without(crew, sku, traps.values())
    before, said = books(crew, sku), len(crew.processes["lanes"].logs())
    with crew.service.redis() as redis:
        told = {key: redis.get(key) for key in redis.scan_iter("fairlane:purchase:*")}
        for trap in traps.values():
            trap.let_go()
        await until(lambda: is_idle(crew, "lanes"), "workers who have nothing left to do")
        # Two of them lost their transaction, and with it all they would have written; the third is late with its news.
        lost = rf"raised unexpected: UnavailableError\('Postgres failed: \w+ \({LOST_ITS_TRANSACTION}\)'\)"
        assert len(re.findall(lost, crew.processes["lanes"].logs()[said:])) == 2
        assert {key: redis.get(key) for key in told} == told
    assert books(crew, sku) == before
    assert (await crew.ends_well(buyers)).confirmed == len(buyers.accepted)


async def test_charge_workers_frozen_around_their_calls(crew: Floor, sku: str) -> None:
    crew.put_item(sku, STOCK)
    traps = {
        "charges.2": crew.trap("charges.2", "charge.after_claim", "stop"),
        "charges.3": crew.trap("charges.3", "charge.after_lock", "stop"),
        "charges.4": crew.trap("charges.4", "charge.after_call", "stop"),
        "charges.5": crew.trap("charges.5", "record.before_commit", "stop"),
        "charges.6": crew.trap("charges.6", "record.after_commit", "stop"),
    }
    buyers = await feed_until_they_stand_still(crew, sku, traps.values())
    await all_are_final_without(crew, sku, traps.values())
    before = books(crew, sku)
    assert set(crew.posts(sku).values()) == {1}
    said = {name: len(crew.processes[name].logs()) for name in traps}
    for trap in traps.values():
        trap.let_go()
    await until(lambda: all(is_idle(crew, name) for name in traps), "workers who have nothing left to do")
    late = {name: crew.processes[name].logs()[offset:] for name, offset in said.items()}
    # Awake too late to call, and without a word that counts.
    for name in ("charges.2", "charges.3"):
        assert "too_late" in late[name]
        assert "outcome_did_not_count" in late[name]
    # Its transaction is gone; the outcome it knows stands already.
    assert LOST_ITS_TRANSACTION in late["charges.5"]
    # What was paid counts as recorded. (Others that they had claimed together with it were not sent.)
    for name in ("charges.4", "charges.5", "charges.6"):
        assert not re.search('"outcome": "Confirmed.*outcome_did_not_count', late[name])
    assert set(crew.posts(sku).values()) == {1}
    assert books(crew, sku) == before
    assert (await crew.ends_well(buyers)).confirmed == len(buyers.accepted)


async def test_charge_workers_frozen_in_a_call_and_around_a_question(crew: Floor, sku: str) -> None:
    crew.put_item(sku, STOCK)
    traps: dict[str, Trap] = {}
    # One call in five gets no answer: more would pause the claims.
    tokens = ["tok_fault_hang_up_after_charge", *["tok_visa"] * 4]
    async with crowd(crew.url, [sku], rate=RATE, tokens=tokens) as doubted:
        for names, point in (
            (["charges", "charges.2", "charges.3"], "reconcile.after_claim"),
            (["charges.4", "charges.5", "charges.6"], "reconcile.after_answer"),
        ):
            traps |= await whoever_comes_first(crew, names, point)
    caller, slow = await frozen_in_a_call(crew, f"{sku}-slow")
    assert caller not in traps
    await all_are_final_without(crew, sku, traps.values())
    await until(lambda: not set(crew.statuses(*slow.skus)) - FINAL, "an end of the call, too")
    assert crew.processes[caller].paused
    before = books(crew, sku, *slow.skus)
    crew.processes[caller].resume()
    for trap in traps.values():
        trap.let_go()
    await until(lambda: all(is_idle(crew, name) for name in (caller, *traps)), "workers who have nothing left to do")
    assert set((crew.posts(sku) | crew.posts(*slow.skus)).values()) == {1}
    assert books(crew, sku, *slow.skus) == before
    for buyers in (doubted, slow):
        assert (await crew.ends_well(buyers)).confirmed == len(buyers.accepted)


async def frozen_in_a_call(crew: Floor, sku: str) -> tuple[str, Crowd]:
    """Stop a charge worker while it waits for the answer to a call, which then comes; its name, and the buyer."""
    crew.put_item(sku, STOCK)
    buyers = Crowd(crew.url, [sku], rate=RATE, tokens=[], random=Random(), limit=0)
    for _ in range(TRIES):
        async with crowd(crew.url, [sku], tokens=["tok_fault_slow"], limit=1) as slow:
            pass
        buyers.accepted |= slow.accepted
        [called] = slow.accepted.values()
        await until(lambda called=called: crew.posts(sku)[called] == 1, "a call under way")  # type: ignore[misc]
        [attempt] = crew.rows("SELECT worker FROM fairlane.charge_attempts WHERE purchase_id = %s", called)
        [caller] = [name for name in crew.lines if attempt["worker"].endswith(f":{crew.processes[name].pid}")]
        crew.processes[caller].pause()
        if {row["id"]: row["status"] for row in crew.service.purchases(sku)}[called] == "charging":
            return caller, buyers
        crew.processes[caller].resume()
    raise AssertionError("every call was over too soon")


async def test_sweeps_frozen_in_their_round(crew: Floor, sku: str) -> None:
    crew.put_item(sku, STOCK)
    traps = {
        "sweep": crew.trap("sweep", "sweep.before_commit", "stop"),
        "sweep.2": crew.trap("sweep.2", "sweep.after_commit", "stop"),
    }
    for trap in traps.values():
        await trap.springs()
    # Only a sweep has the provider asked: what is in doubt would stay so.
    async with crowd(crew.url, [sku], rate=RATE, tokens=["tok_fault_hang_up_after_charge"], limit=3) as buyers:
        pass
    await all_are_final_without(crew, sku, traps.values())
    before = books(crew, sku)
    for trap in traps.values():
        trap.let_go()
    await until(lambda: LOST_ITS_TRANSACTION in crew.processes["sweep"].logs_of_run(), "a round that was lost")
    for name in traps:
        again = crew.trap(name, "sweep.after_commit", "stop")
        await again.springs()
        again.let_go()
    assert books(crew, sku) == before
    assert (await crew.ends_well(buyers)).confirmed == 3


async def test_half_of_everything_frozen_and_then_the_api_during_a_busy_sale(crew: Floor, sku: str) -> None:
    crew.put_item(sku, STOCK)
    half = [crew.processes[name] for name in ("lanes", "charges", "sweep")]
    async with crowd(crew.url, [sku], rate=RATE * 2) as buyers:
        await until(lambda: crew.statuses(sku)["confirmed"] > 0, "a sale that runs")
        for process in half:
            process.pause()
        confirmed = crew.statuses(sku)["confirmed"]
        await asyncio.sleep(LONGER_THAN_ALL + 1)  # the fault is that it lasts
        await until(lambda: crew.statuses(sku)["confirmed"] >= confirmed + 20, "a sale that goes on")
        assert all(process.paused for process in half)
        for process in half:
            process.resume()
        crew.processes["web"].pause()
        await asyncio.sleep(1)  # what it had answered already has arrived
        accepted = len(buyers.accepted)
        await asyncio.sleep(LONGER_THAN_ALL)
        assert crew.processes["web"].paused
        assert len(buyers.accepted) == accepted
        assert buyers.troubles["TimeoutError"] > 0
        crew.processes["web"].resume()
        await until(lambda: len(buyers.accepted) >= accepted + 20, "a sale that goes on")
    assert (await crew.ends_well(buyers)).confirmed == len(buyers.accepted)
