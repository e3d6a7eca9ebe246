"""The worker that decides a busy lane freezes for good, or dies: another one decides the lane.

How soon is measured by `python -m tests.faults.next_decision`; here it must come at all.
"""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.faults.crowd import crowd
from tests.faults.floor import Floor
from tests.faults.next_decision import BOUND, RATE, WORKERS, hurt

#: A second worker is started, and another one again.
pytestmark = pytest.mark.timeout(240)


async def test_the_other_worker_decides_the_lane(floor: Floor, sku: str) -> None:
    hurt_one, other = WORKERS
    await asyncio.to_thread(floor.start, "lanes", name=other)
    process = floor.processes[hurt_one]
    try:
        floor.put_item(sku, 1_000)
        async with crowd(floor.url, [sku], rate=RATE) as buyers:
            await hurt(floor, sku, hurt_one, signal.SIGSTOP, "decide.before_commit")
            assert process.paused
            await asyncio.to_thread(floor.restore)
            await hurt(floor, sku, hurt_one, signal.SIGKILL, "decide.before_commit")
            assert process.wait_exit(BOUND) == -signal.SIGKILL
            assert floor.processes[other].alive
        # All of them, while the dead one stays dead.
        assert (await floor.ends_well(buyers)).confirmed == len(buyers.accepted)
    finally:
        floor.dismiss(other)
