"""Many items without a payment: a Zipf crowd over 1,000, and 10,000 of which all are wanted alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from ops.bench import lines, selling
from ops.bench.buyers import LOCK, UPDATE, Demand
from ops.bench.contest import Contest
from ops.bench.samples import FAIRLANE, Contender, Result, Sample

ZIPF, EVEN = "zipf", "even"
#: The hot item's line, settled in the same rounds: what a line of many items is compared with.
HOT = Contender("Fairlane, one hot item", limit=True)

SECONDS = 0.5
PURCHASES, PURCHASES_QUICK = 10_000, 4_000
#: What is given up, and the best that sells many items: ten segments are a way to sell one hot item, and a queue and a
#: worker for each of 1,000 items is none.
_PEERS = (LOCK, UPDATE)


def measure(contest: Contest) -> list[Result]:
    """Settled per second, of both crowds."""
    purchases = contest.scaled(PURCHASES, PURCHASES_QUICK)
    zipf = [f"zipf-{number}" for number in range(1_000)]
    weights = [1 / rank for rank in range(1, len(zipf) + 1)]
    even = [f"even-{number}" for number in range(10_000)]
    with contest.site.only(["lanes"]) as site:
        lines.create_items(site, [*zipf, *even, "hot"], 10_000_000)
        choose = random.Random(7)
        peers = contest.chosen(_PEERS, quick=())

        def settle(skus: Sequence[str]) -> Sample:
            lines.queue_purchases(site, skus, purchases)
            return lines.decide(site, skus, purchases)

        def fairlane_zipf() -> Sample:
            return settle(choose.choices(zipf, cum_weights=list(accumulate(weights)), k=purchases))

        by_zipf = contest.run(
            {
                **selling.peers(contest, site, Demand(zipf, weights, SECONDS), paid=False, chosen=peers),
                FAIRLANE: fairlane_zipf,
            }
        )
        by_even = contest.run(
            {
                **selling.peers(contest, site, Demand(even, seconds=SECONDS), paid=False, chosen=peers),
                FAIRLANE: lambda: settle(even),
                HOT: lambda: settle(["hot"]),
            }
        )
    return [
        Result(ZIPF, "1,000 items, wanted by Zipf's law, no payment", "purchases settled", by_zipf),
        Result(EVEN, "10,000 items, wanted alike, no payment", "purchases settled", by_even),
    ]
