"""What the benchmark measures: one sample per contender and round, and what the rounds say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

#: Points of a latency curve: the quickest (0), every hundredth, the slowest (100).
_POINTS = 101


@dataclass(frozen=True, slots=True)
class Sample:
    """One contender in one round: `count` things done in `seconds`.

    `curve` holds the seconds that each hundredth of them took, or nothing where single latencies mean nothing (a line
    that was there before). `cpu` is processor seconds by process, `memory` the most bytes in use by process.
    """

    count: int
    seconds: float
    curve: tuple[float, ...] = ()
    cpu: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Things done per second."""
        return self.count / self.seconds

    @property
    def p50(self) -> float | None:
        """Seconds within which half of them were done."""
        return self.curve[50] if self.curve else None

    @property
    def p99(self) -> float | None:
        """Seconds within which 99 of 100 were done."""
        return self.curve[99] if self.curve else None


def curve_of(latencies: Sequence[float]) -> tuple[float, ...]:
    """The latency of each hundredth, from the quickest to the slowest; empty if there are none."""
    if not latencies:
        return ()
    ordered = sorted(latencies)
    last = len(ordered) - 1
    return tuple(ordered[round(last * point / (_POINTS - 1))] for point in range(_POINTS))


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do what a scenario asks for. `ours` is Fairlane; a `limit` is what no such way can pass."""

    name: str
    ours: bool = False
    limit: bool = False


FAIRLANE = Contender("Fairlane", ours=True)


@dataclass(frozen=True, slots=True)
class Result:
    """A scenario's samples by contender, one per round, in the order of the rounds.

    `facts` are single numbers that are not rates, by name; `unit` is what was counted.
    """

    name: str
    title: str
    unit: str
    samples: Mapping[Contender, Sequence[Sample]]
    facts: Mapping[str, float] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        """The median rate of a contender. Raises KeyError for one that did not take part."""
        return median(sample.rate for sample in self._of(name))

    def latency(self, name: str, point: int) -> float | None:
        """The median, over the rounds, of this hundredth of a contender's latency curve, in seconds."""
        curves = [sample.curve for sample in self._of(name) if sample.curve]
        return median(curve[point] for curve in curves) if curves else None

    def ratio(self, name: str, other: str) -> float:
        """How many times as fast `name` is as `other`: the median of the ratios of each round."""
        rounds = zip(self._of(name), self._of(other), strict=True)
        return median(sample.rate / against.rate for sample, against in rounds)

    def cpu_per_1000(self, name: str) -> dict[str, float]:
        """Processor seconds by process for 1,000 of what was counted, median over the rounds."""
        samples = self._of(name)
        return {
            process: median(sample.cpu.get(process, 0.0) / sample.count * 1000 for sample in samples)
            for process in samples[0].cpu
        }

    def memory(self, name: str) -> dict[str, int]:
        """The most bytes that were in use by process, over all rounds."""
        samples = self._of(name)
        return {process: max(sample.memory.get(process, 0) for sample in samples) for process in samples[0].memory}

    def best_peer(self) -> str:
        """The fastest contender that is neither Fairlane nor a limit."""
        peers = [contender.name for contender in self.samples if not (contender.ours or contender.limit)]
        return max(peers, key=self.rate)

    def _of(self, name: str) -> Sequence[Sample]:
        return {contender.name: samples for contender, samples in self.samples.items()}[name]

    def as_json(self) -> dict[str, Any]:
        """Everything, as `--json` shows it: medians, and the rounds they are of."""
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "facts": dict(self.facts),
            "contenders": [
                {
                    "name": contender.name,
                    "limit": contender.limit,
                    "per_second": self.rate(contender.name),
                    "p50_seconds": self.latency(contender.name, 50),
                    "p99_seconds": self.latency(contender.name, 99),
                    "cpu_seconds_per_1000": self.cpu_per_1000(contender.name),
                    "memory_bytes": self.memory(contender.name),
                    "rounds": [
                        {"count": sample.count, "seconds": sample.seconds, "p50": sample.p50, "p99": sample.p99}
                        for sample in samples
                    ],
                }
                for contender, samples in self.samples.items()
            ],
        }
