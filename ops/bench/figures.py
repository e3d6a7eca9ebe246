"""The figures Fairlane is to reach, and what this run says of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ops.bench.buyers import LOCK, PROMPT_LOCK
from ops.bench.samples import FAIRLANE, Result
from ops.bench.scenarios import (
    backlog,
    charges,
    checkout,
    door,
    hot_item,
    idle,
    killed,
    latency,
    many_items,
    neighbours,
)

_MIB = 1024 * 1024
Results = Mapping[str, Result]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: what it is of, what is wanted, what was seen, and whether that is enough."""

    what: str
    wanted: str
    seen: str
    met: bool


def figures(results: Iterable[Result]) -> list[Figure]:
    """Every figure whose scenarios were run, in the order of the table in docs/performance.md."""
    by_name = {result.name: result for result in results}
    found = []
    for judge, *needed in _JUDGES:
        if all(name in by_name for name in needed):
            found += judge(by_name)
    return found


def _at_least(what: str, bound: float, seen: float, unit: str = "×") -> Figure:
    return Figure(what, f"≥ {bound:,g}{unit}", f"{_short(seen)}{unit}", seen >= bound)


def _at_most(what: str, bound: float, seen: float, unit: str) -> Figure:
    return Figure(what, f"≤ {bound:,g}{unit}", f"{_short(seen)}{unit}", seen <= bound)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _hot_item(results: Results) -> list[Figure]:
    result = results[hot_item.NAME]
    peer = result.best_peer()
    return [
        _at_least(
            "decisions of one hot item, of the SQL loop", 0.3, result.ratio(FAIRLANE.name, hot_item.SQL_LOOP.name)
        ),
        _at_least(f"decisions of one hot item, of the best peer ({peer})", 8, result.ratio(FAIRLANE.name, peer)),
    ]


def _even(results: Results) -> list[Figure]:
    ratio = results[many_items.EVEN].ratio(FAIRLANE.name, many_items.HOT.name)
    return [_at_least("decisions of 10,000 items evenly, of the hot item's", 0.5, ratio)]


def _checkout(results: Results) -> list[Figure]:
    result = results[checkout.NAME]
    there = {contender.name for contender in result.samples}
    lock = max(there & {LOCK.name, PROMPT_LOCK.name}, key=result.rate)
    return [
        _at_least(
            "whole checkouts over HTTP, 50 ms payment, two polls each", 900, result.rate(FAIRLANE.name), " a second"
        ),
        _at_least(f"whole checkouts, of the better lock ({lock})", 40, result.ratio(FAIRLANE.name, lock)),
    ]


def _door(results: Results) -> list[Figure]:
    result = results[door.NAME]
    return [
        _at_least("accept (durable 202), of a bare 202", 0.4, result.ratio(door.ACCEPT.name, door.BARE.name)),
        _at_least("refuse a sold-out item, of a bare 202", 0.6, result.ratio(door.REFUSE.name, door.BARE.name)),
    ]


def _latency(results: Results) -> list[Figure]:
    p99 = results[latency.NAME].latency(FAIRLANE.name, 99) or 0.0
    return [_at_most("accepted to decided at 30% of the peak, p99", 50, p99 * 1000, " ms")]


def _backlog(results: Results) -> list[Figure]:
    found = []
    for name, result in results.items():
        if not name.startswith(f"{backlog.NAME}-"):
            continue
        length = int(name.rpartition("-")[2])
        short, long = backlog.of_length(backlog.SHORT).name, backlog.of_length(length).name
        grown = (result.memory(long)["lanes"] - result.memory(short)["lanes"]) / _MIB
        found += [
            _at_least(f"decisions with {length:,} queued, of those with 1,000", 0.8, result.ratio(long, short)),
            _at_most(f"a worker's memory with {length:,} queued, more than with 1,000", 20, max(grown, 0.0), " MiB"),
        ]
    return found[-2:]


def _charges(results: Results) -> list[Figure]:
    result = results[charges.NAME]
    return [
        _at_least("charges by one process, 50 ms payment", 1_500, result.rate(FAIRLANE.name), " a second"),
        _at_least("charges, of one Celery task per charge", 5, result.ratio(FAIRLANE.name, charges.PEER.name)),
    ]


def _idle(results: Results) -> list[Figure]:
    return [_at_most("idle, all processes but Flower", 3, results[idle.NAME].facts[idle.SHARE] * 100, "% of a core")]


def _neighbours(results: Results) -> list[Figure]:
    result = results[neighbours.NAME]
    beside, alone = (result.latency(each.name, 99) or 0.0 for each in (neighbours.BESIDE, neighbours.ALONE))
    return [_at_most("a quiet lane's p99 beside a hot one, of its own when alone", 3, beside / alone, "×")]


def _killed(results: Results) -> list[Figure]:
    longest = results[killed.NAME].facts[killed.LONGEST]
    return [_at_most("next decision after kill -9, the longest", 1, longest, " s")]


_JUDGES: tuple[tuple[Callable[[Results], list[Figure]], str] | tuple[Callable[[Results], list[Figure]]], ...] = (
    (_hot_item, hot_item.NAME),
    (_even, many_items.EVEN),
    (_checkout, checkout.NAME),
    (_door, door.NAME),
    (_latency, latency.NAME),
    (_backlog,),
    (_charges, charges.NAME),
    (_idle, idle.NAME),
    (_neighbours, neighbours.NAME),
    (_killed, killed.NAME),
)
