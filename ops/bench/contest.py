"""Rounds: every contender runs once in each, in turn, so that what the machine does besides hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from ops.bench.samples import Contender, Sample

Run = Callable[[], Sample]


@dataclass(frozen=True, slots=True)
class Contest:
    """What every scenario is given.

    `rounds` is how often each contender runs; `quick` asks for small numbers, of which only the order of magnitude
    means anything. `pool` has the processes of buyers and load generators. `say` tells whoever watches how far it is.
    """

    pool: ProcessPoolExecutor
    rounds: int
    quick: bool
    say: Callable[[str], None]

    def run(self, contenders: Mapping[Contender, Run]) -> dict[Contender, list[Sample]]:
        """The samples of all rounds. Each round begins with another contender than the last."""
        samples: dict[Contender, list[Sample]] = {contender: [] for contender in contenders}
        names = list(contenders)
        for number in range(self.rounds):
            for contender in names[number % len(names) :] + names[: number % len(names)]:
                self.say(f"round {number + 1} of {self.rounds}: {contender.name}")
                samples[contender].append(contenders[contender]())
        return samples

    def scaled(self, full: int, quick: int) -> int:
        """A number that is smaller in a quick run."""
        return quick if self.quick else full
