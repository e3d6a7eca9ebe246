"""Rounds: every contender runs once in each, in turn, so that what the machine does besides hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from ops.bench.buyers import LOCK, UPDATE, Peer
from ops.bench.samples import Contender, Sample
from ops.bench.site import Site

Run = Callable[[], Sample]

#: What is given up, and the best that is as simple.
_QUICK = (LOCK, UPDATE)


@dataclass(frozen=True, slots=True)
class Contest:
    """What every scenario is given.

    `rounds` is how often each contender runs; `quick` asks for small numbers, of which only the order of magnitude
    means anything. `pool` has the processes of buyers and load generators. `site` has every line of the Procfile but
    Flower's, and a provider that takes 50 ms; a scenario asks it for those it needs (`Site.only`). `say` tells whoever
    watches how far it is.
    """

    pool: ProcessPoolExecutor
    site: Site
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

    def chosen(self, peers: Sequence[Peer], quick: Sequence[Peer] = _QUICK) -> Sequence[Peer]:
        """All of these, or in a quick run the few that show the most."""
        return [peer for peer in peers if peer in quick] if self.quick else peers

    def scaled(self, full: int, quick: int) -> int:
        """A number that is smaller in a quick run."""
        return quick if self.quick else full
