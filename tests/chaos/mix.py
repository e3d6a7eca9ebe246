"""One run of the mix: faults at their moments, buyers all the while, and in the end the books."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.states import FINAL
from tests.chaos.buyers import Buyers
from tests.chaos.faults import FAULTS
from tests.chaos.schedule import Event, schedule
from tests.chaos.stage import Stage, open_stage
from tests.chaos.verdict import Verdict, judge

#: Buyers a second at most. Two cores that also carry two of every worker serve about three times as many.
RATE = 30.0
#: Seconds from the last fault until every buyer has heard something definite, and until all is final: an unknown call
#: takes ten, twice that when its second attempt is lost as well; a purchase whose calls were not sent again and again
#: waits for up to half a minute between two of them.
ANSWERED_WITHIN, FINAL_WITHIN = 60.0, 150.0
#: More faults than this at once are never drawn: each has another target.
_AT_ONCE = 32
_TELL_EVERY = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a run went. `fired` and `drawn` count faults by kind; `missed` says which did not fire, and why."""

    seed: int
    seconds: float
    verdict: Verdict
    drawn: Counter[str]
    fired: Counter[str]
    missed: list[str]
    came: int
    refused: Counter[str]
    troubles: Counter[str]
    replayed: int
    behind: int
    starts_refused: int
    settled_within: float

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not self.verdict.broken

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        verdict = self.verdict
        return {
            "seed": self.seed,
            "seconds": self.seconds,
            "ok": self.ok,
            "faults": {kind: {"fired": self.fired[kind], "drawn": self.drawn[kind]} for kind in sorted(self.drawn)},
            "faults_fired": self.fired.total(),
            "buyers": self.came,
            "purchases": dict(sorted(verdict.purchases.items())),
            "purchases_total": verdict.purchases.total(),
            "purchases_per_second": round(verdict.purchases.total() / self.seconds, 1),
            "refused": dict(self.refused),
            "asked_again_later": self.replayed,
            "told_what_was_over": self.behind,
            "troubles": dict(self.troubles),
            "starts_refused": self.starts_refused,
            "settled_within": round(self.settled_within, 1),
            "lost": len(verdict.lost),
            "oversold": len(verdict.oversold),
            "charged_twice": len(verdict.charged_twice),
            "winners_lost": len(verdict.winners_lost),
            "broken": verdict.broken,
            "missed": self.missed,
        }


async def run(
    seed: int, seconds: float, directory: Path, procfile: Path, *, tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Run the mix of this seed in a folder of its own, which keeps logs, books and the journal of the faults.

    Raises ProcessError or TimeoutError when the service does not come back after the last fault.
    """
    with open_stage(directory, procfile) as stage:
        async with Buyers(stage.urls, seed, rate=RATE) as buyers:
            coming = asyncio.create_task(buyers.come())
            try:
                fired, missed, drawn = await _hurt(stage, buyers, schedule(seed, seconds), seconds, tell)
            finally:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            restored = time.monotonic()
            tell("restored; waiting until everybody has heard, and all is final")
            await buyers.all_answered(ANSWERED_WITHIN)
            await _all_final(stage)
            return Outcome(
                seed=seed,
                seconds=seconds,
                verdict=await judge(stage.floor, buyers.heard, stage.ended_alone),
                drawn=drawn,
                fired=fired,
                missed=missed,
                came=buyers.came,
                refused=buyers.heard.refused,
                troubles=buyers.heard.troubles,
                replayed=buyers.heard.replayed,
                behind=buyers.heard.behind,
                starts_refused=stage.starts_refused,
                settled_within=time.monotonic() - restored,
            )


async def _hurt(
    stage: Stage, buyers: Buyers, events: list[Event], seconds: float, tell: Callable[[str], None]
) -> tuple[Counter[str], list[str], Counter[str]]:
    """Apply every fault at its moment, then take all back."""
    fired, drawn = Counter[str](), Counter[str](event.kind for event in events)
    missed: list[str] = []

    def apply(event: Event) -> None:
        with stage.hands[event.target]:
            if stage.over.is_set():
                missed.append(f"{event.at:.1f} s {event.kind} ({event.target}): its target was busy until the end")
                return
            began = stage.elapsed
            try:
                seen, why = FAULTS[event.kind](stage, event), "nobody felt it"
            except Exception as error:  # noqa: BLE001 - a server that is hurt in two ways refuses the second one
                seen, why = None, f"{type(error).__name__}: {error}"
            stage.note("fault", kind=event.kind, target=event.target, seconds=event.seconds, began=began, seen=seen)
        if seen is None:
            missed.append(f"{event.at:.1f} s {event.kind} ({event.target}): {why}")
        else:
            fired[event.kind] += 1

    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fault")
    stage.begin()
    telling = _TELL_EVERY
    try:
        for event in [*events, None]:
            at = seconds if event is None else event.at
            while (pause := at - stage.elapsed) > 0:
                await asyncio.sleep(min(pause, max(0.01, telling - stage.elapsed)))
                if stage.elapsed >= telling:
                    telling += _TELL_EVERY
                    tell(
                        f"{stage.elapsed:4.0f} s: {fired.total()} faults, {len(buyers.heard.accepted)} accepted,"
                        f" {buyers.heard.refused.total()} refused, {buyers.waiting} waiting"
                    )
            if event is not None:
                loop.run_in_executor(threads, apply, event)
    finally:
        stage.over.set()
        await asyncio.to_thread(threads.shutdown, cancel_futures=True)
    await asyncio.to_thread(stage.settle)
    return fired, missed, drawn


async def _all_final(stage: Stage) -> None:
    """Wait until nothing moves any more; what is not final after the bound is for the verdict."""
    deadline = time.monotonic() + FINAL_WITHIN
    while set(stage.floor.statuses()) - FINAL and time.monotonic() < deadline:  # noqa: ASYNC110 - it is in Postgres
        await asyncio.sleep(0.5)
