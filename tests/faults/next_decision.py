"""How soon a busy lane is decided again when the worker that decides it dies or freezes.

`python -m tests.faults.next_decision --rounds 20` starts a sale floor of its own with two lane workers, hurts the one
that has the lane in its hands, again and again, and prints how long the lane stood still. The settings that bound that
(`CALLED_TTL`, `SWEEP_EVERY`, `LOCK_TIMEOUT`, `IDLE_IN_TRANSACTION_TIMEOUT`) are the defaults. `test_next_decision.py`
asks only that the next decision comes, as a time on a busy machine is no test.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median, quantiles

import psycopg

from shared.routing import lane_of
from tests.faults.crowd import crowd
from tests.faults.floor import Floor, open_floor

#: Two workers decide. Each runs four processes, any of which may take the lane.
WORKERS = ("lanes", "lanes.2")
FAULTS = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
#: Where the worker is in its turn when it is hurt: it has the lane's lock, has written but not committed, has committed
#: but told nobody. And at any moment, whoever has the lane.
STAGES = ("decide.after_lock", "decide.before_commit", "decide.after_commit", None)
#: Buyers per second: a call for the lane is always on its way.
RATE = 60.0
#: Seconds in which the next decision must come at all.
BOUND = 30.0
#: A child that stood for longer before its whole worker was hurt is not counted: in between, its brothers queued up
#: behind it, and the sweep's calls went to them. On a machine with room it is a few milliseconds.
AT_ONCE = 0.1
#: Seconds between two looks; what is measured is as exact as that.
LOOK_EVERY = 0.004


@dataclass(frozen=True)
class Standstill:
    """How long a lane was not decided, in seconds; and how long before the signal its worker's child stood already."""

    seconds: float
    early: float


async def hurt(floor: Floor, sku: str, name: str, fault: int, stage: str | None) -> Standstill:
    """Send the worker `name` and all its children a signal, and wait for the lane's next decision by somebody else.

    With a `stage`, one of its children stands at that crash point of this item's lane. Counted from the signal (from
    the child's own stop, if it is to be frozen) to the first commit that was seen after it. The worker is left as it
    is.
    """
    lane = lane_of(sku, floor.settings.lanes)
    with psycopg.connect(floor.service.database_url, autocommit=True) as connection:

        def decided_through() -> int:
            row = connection.execute("SELECT decided_through FROM fairlane.lanes WHERE lane = %s", [lane]).fetchone()
            assert row is not None
            return int(row[0])

        decided_through()  # prepared: nothing may lie between the child's stop and the signal
        trap = None
        if stage is not None:
            trap = floor.trap(name, stage, "stop")
            await trap.springs(look_every=LOOK_EVERY)
        signalled = time.time()
        os.killpg(floor.processes[name].pid, fault)
        early = 0.0 if trap is None else signalled - trap.sprung_at
        began = signalled if fault == signal.SIGKILL else signalled - early
        before = decided_through()
        deadline = time.monotonic() + BOUND
        while decided_through() == before:
            assert time.monotonic() < deadline, f"no decision within {BOUND:g} s after {name} was hurt"
            await asyncio.sleep(LOOK_EVERY)
        return Standstill(time.time() - began, early)


async def _measure(floor: Floor, rounds: int, random: Random) -> None:
    floor.start("lanes", name=WORKERS[1])
    sku = "hot"
    floor.put_item(sku, 1_000_000)
    async with crowd(floor.url, [sku], rate=RATE, random=random):
        for word, fault in FAULTS.items():
            everything: list[float] = []
            for stage in STAGES:
                gaps: list[float] = []
                while len(gaps) < rounds:
                    name = random.choice(WORKERS)
                    await asyncio.sleep(random.random())
                    stood = await hurt(floor, sku, name, fault, stage)
                    if stood.early < AT_ONCE:
                        gaps.append(stood.seconds)
                    if fault == signal.SIGKILL:
                        floor.processes[name].kill()
                    await asyncio.to_thread(floor.restore)
                everything += gaps
                print(_line(word, stage or "any moment", gaps), flush=True)
            print(_line(word, "all", everything), flush=True)


def _line(fault: str, stage: str, gaps: Sequence[float]) -> str:
    ninth = quantiles(gaps, n=10)[-1] if len(gaps) > 1 else gaps[0]
    return (
        f"{fault:8} {stage:22} n={len(gaps):3}  min {min(gaps):.2f}  median {median(gaps):.2f}"
        f"  p90 {ninth:.2f}  max {max(gaps):.2f} s"
    )


def main() -> int:
    """Measure, and print one line per fault and stage."""
    parser = argparse.ArgumentParser(description="How soon a busy lane is decided again.")
    parser.add_argument("--rounds", type=int, default=20, help="per fault and stage")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    procfile = Path(__file__).parents[2] / "Procfile"
    with tempfile.TemporaryDirectory() as directory, open_floor(Path(directory), procfile) as floor:
        asyncio.run(_measure(floor, wanted.rounds, Random(wanted.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
