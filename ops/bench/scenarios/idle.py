"""Nobody buys: what all processes use while they wait."""

from __future__ import annotations

import time
from statistics import median

from ops.bench.contest import Contest
from ops.bench.samples import FAIRLANE, Result, Sample

NAME = "idle"
SHARE = "share of one core"
"""The name of the fact: processor seconds per second of all processes together, Flower left out."""

_LINES = ("web", "lanes", "charges", "sweep")
#: Until what belongs to the start is over: first connections, Postgres' first checkpoint and vacuum.
_SETTLE, _SETTLE_QUICK = 4.0, 0.5
_SECONDS, _SECONDS_QUICK = 3.0, 1.0


def measure(contest: Contest) -> list[Result]:
    """Processor time in a window per round; what is counted are milliseconds."""
    with contest.site.only(_LINES) as site:
        contest.say("everything waits")
        time.sleep(_SETTLE_QUICK if contest.quick else _SETTLE)

        def wait() -> Sample:
            usage = site.usage()
            began = time.monotonic()
            time.sleep(_SECONDS_QUICK if contest.quick else _SECONDS)
            seconds = time.monotonic() - began
            used = usage.read()
            return Sample(round(seconds * 1000), seconds, cpu=used.cpu, memory=used.memory)

        samples = contest.run({FAIRLANE: wait})
    shares = [sum(sample.cpu.values()) / sample.seconds for sample in samples[FAIRLANE]]
    return [Result(NAME, "Nobody buys", "milliseconds waited", samples, {SHARE: median(shares)})]
