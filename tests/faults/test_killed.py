"""Each process killed at each of its crash points while a sale runs, and started again: the sale ends as it should.

The processes of the Procfile are killed together, one crash point each, in rounds: what one death costs in waiting
(deadlines, leases, restarts) passes for all of them at once. A child that decides lanes is replaced by its parent.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import pytest

from shared.crash_points import POINTS
from tests.faults.commits import SlowCommits, slow_commits
from tests.faults.crowd import ANSWER_WITHIN, ASK_AGAIN_AFTER, crowd
from tests.faults.floor import Floor
from tests.faults.traps import Trap, is_dead

#: Six units and eight buyers. The first cannot pay, and the second is charged by a provider that then hangs up without
#: a word, so that there is something to ask about.
STOCK, PAYERS = 6, 6
NO_MONEY, NO_ANSWER = "tok_declined", "tok_fault_hang_up_after_charge"
#: Buyers of another item come until the API dies, and go on insisting.
LATER_STOCK = 5
#: Buyers per second.
AT_ONCE = 1_000.0
#: Seconds in which something happens that must happen.
BOUND = 30.0

#: Which process dies where.
ROUNDS: list[Mapping[str, str]] = [
    {
        "web": "accept.before_commit",
        "lanes": "decide.after_lock",
        "charges": "charge.after_claim",
        "sweep": "sweep.before_commit",
    },
    {
        "web": "accept.after_commit",
        "lanes": "decide.after_forget",
        "charges": "charge.after_lock",
        "sweep": "sweep.after_commit",
    },
    {
        "web": "accept.after_publish",
        "lanes": "decide.before_commit",
        "charges": "charge.after_call",
        "sweep": "call.before_publish",
    },
    {
        "web": "call.before_publish",
        "lanes": "decide.after_commit",
        "charges": "record.before_commit",
        "sweep": "call.after_publish",
    },
    {"web": "call.after_publish", "lanes": "decide.after_publish", "charges": "record.after_commit"},
    {"lanes": "call.before_publish", "charges": "record.after_publish"},
    {"lanes": "call.after_publish", "charges": "reconcile.after_claim"},
    {"charges": "reconcile.after_answer"},
]

#: Where the API dies while it cancels, and how the purchase then stands.
CANCELLING = {"cancel.before_commit": "reserved", "cancel.after_commit": "cancelled"}


def test_every_point_is_somebodys_death() -> None:
    assert {point for deaths in ROUNDS for point in deaths.values()} | CANCELLING.keys() == POINTS


@pytest.mark.parametrize("deaths", ROUNDS, ids=lambda deaths: "+".join(deaths.values()))
async def test_killed_at_each_crash_point(floor: Floor, sku: str, deaths: Mapping[str, str]) -> None:
    first, second = sku, f"{sku}-b"
    floor.put_item(first, STOCK)
    floor.put_item(second, LATER_STOCK)
    deadly = {line: floor.trap(line, point) for line, point in deaths.items() if line != "web"}
    async with asyncio.TaskGroup() as others:
        for line, trap in deadly.items():
            others.create_task(dies_and_is_replaced(floor, line, trap))
        # These two before all others: for who comes last there may be nothing left, and so nothing to ask about.
        for token in (NO_MONEY, NO_ANSWER):
            async with crowd(floor.url, [first], tokens=[token], limit=1):
                pass
        async with crowd(floor.url, [first], rate=AT_ONCE, limit=PAYERS) as buyers:
            pass
        if "web" in deaths:
            trap = floor.trap("web", deaths["web"])
            async with crowd(floor.url, [second]) as later:
                await dies_and_is_replaced(floor, "web", trap)
                await until(lambda: len(later.accepted) >= LATER_STOCK, "a sale that goes on")
            assert (await floor.ends_well(later)).confirmed == LATER_STOCK
    ending = await floor.ends_well(buyers)
    assert ending.confirmed == STOCK, ending.statuses


@pytest.mark.parametrize("point", ["decide.after_lock", "decide.before_commit", "decide.after_commit"])
async def test_a_worker_killed_with_all_its_children_in_the_middle_of_a_lane(
    floor: Floor, sku: str, point: str
) -> None:
    floor.put_item(sku, 2)
    trap = floor.trap("lanes", point, "stop")
    async with crowd(floor.url, [sku], rate=AT_ONCE, limit=3) as buyers:
        pid = await trap.springs()
        floor.kill("lanes")
        assert floor.processes["lanes"].exit_code == -signal.SIGKILL
        assert is_dead(pid)
        decided = floor.rows("SELECT FROM fairlane.purchases WHERE item = %s AND decided_at IS NOT NULL", sku)
        assert bool(decided) == (point == "decide.after_commit")
        await asyncio.to_thread(floor.restore, ["lanes"])
    assert (await floor.ends_well(buyers)).confirmed == 2


async def test_killed_in_the_middle_of_a_call(floor: Floor, sku: str) -> None:
    floor.put_item(sku, 1)
    async with crowd(floor.url, [sku], tokens=["tok_fault_silent_after_charge"], limit=1) as buyers:
        await until(lambda: [*floor.posts(sku).values()] == [1], "a call under way")
        floor.kill("charges")
        assert floor.processes["charges"].exit_code == -signal.SIGKILL
        assert floor.statuses(sku) == {"charging": 1}
        await asyncio.to_thread(floor.restore, ["charges"])
    assert (await floor.ends_well(buyers)).confirmed == 1
    assert [*floor.posts(sku).values()] == [1]


#: Who commits what, and how one sees in a purchase's row that this was once committed.
COMMITS = {
    "accept": ("web", "queued", "true"),
    "decide": ("lanes", "reserved", "decided_at IS NOT NULL"),
    "claim": ("charges", "charging", "attempt > 0"),
    "record": ("charges", "confirmed", "charge_id IS NOT NULL"),
}


@pytest.mark.parametrize("commit", COMMITS)
async def test_killed_while_postgres_commits(floor: Floor, sku: str, commit: str) -> None:
    line, status, trace = COMMITS[commit]

    def committed() -> bool:
        return bool(floor.rows(f"SELECT FROM fairlane.purchases WHERE item = %s AND {trace}", sku))

    floor.put_item(sku, 2)
    with slow_commits(floor, sku, status) as commits:
        async with crowd(floor.url, [sku], rate=AT_ONCE, limit=3) as buyers:
            pid = await committing(commits, line)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: is_dead(pid), "its death")
            if line != "lanes":
                assert floor.processes[line].kill() == -signal.SIGKILL
            assert not committed(), "before the process died"
            commits.go_on()
            await until(committed, "a commit that nobody heard of")
            await asyncio.to_thread(floor.restore, [line])
    assert (await floor.ends_well(buyers)).confirmed == 2


@pytest.mark.parametrize("point", CANCELLING)
async def test_an_api_process_killed_while_it_cancels(floor: Floor, sku: str, point: str) -> None:
    floor.put_item(sku, 1)
    floor.kill("charges")  # so that who has the unit can still cancel
    async with crowd(floor.url, [sku], rate=AT_ONCE, limit=2) as buyers:
        await until(lambda: floor.statuses(sku) == {"reserved": 1, "waitlisted": 1}, "one who has it and one who waits")
        (held,) = [row["id"] for row in floor.service.purchases(sku) if row["status"] == "reserved"]
        trap = floor.trap("web", point)
        async with asyncio.TaskGroup() as others:
            cancelling = others.create_task(cancels(floor, held))
            await trap.springs()
            assert [row["status"] for row in floor.service.purchases(sku) if row["id"] == held] == [CANCELLING[point]]
            await dies_and_is_replaced(floor, "web", trap)
        assert cancelling.result()["status"] == "cancelled"
        await until(lambda: floor.statuses(sku) == {"cancelled": 1, "reserved": 1}, "who waited has it")
        await asyncio.to_thread(floor.restore, ["charges"])
    assert (await floor.ends_well(buyers)).statuses == {"cancelled": 1, "confirmed": 1}


async def cancels(floor: Floor, purchase: str) -> Any:
    """A client that cancels, again and again until it hears something definite."""
    url, headers = f"{floor.url}/v1/purchases/{purchase}", {"Authorization": "Bearer shop-secret"}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_WITHIN)) as session:
        while True:
            try:
                async with session.delete(url, headers=headers) as reply:
                    if reply.status != 503:
                        assert reply.status == 200, await reply.text()
                        return await reply.json()
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            await asyncio.sleep(ASK_AGAIN_AFTER)


async def committing(commits: SlowCommits, line: str) -> int:
    """The process that waits in its commit. Seen once is enough: it naps, and between two naps it is not seen."""
    seen: list[int] = []

    def look() -> bool:
        pid = commits.of(line)
        if pid is not None:
            seen.append(pid)
        return bool(seen)

    await until(look, "a process that commits")
    return seen[0]


async def until(condition: Callable[[], bool], what: str, within: float = BOUND) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.05)


async def dies_and_is_replaced(floor: Floor, line: str, trap: Trap) -> None:
    process = floor.processes[line]
    pid = await trap.springs()
    if line == "lanes":
        # The parent starts another child by itself.
        said = re.compile(rf"pid:{pid} exited with 'signal 9 \(SIGKILL\)'")
        await until(lambda: bool(said.search(process.logs_of_run())), "a parent that sees its child die")
        assert process.alive
        return
    assert pid == process.pid
    assert process.kill() == -signal.SIGKILL
    await asyncio.to_thread(floor.restore, [line])
