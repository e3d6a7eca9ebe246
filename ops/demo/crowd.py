"""Who buys what, when and how: planned as data from a seed, so that the same seed is the same crowd."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ops.catalogue import Line

CATALOGUE = Path(__file__).with_name("catalogue.csv")

HOT = "aurora-sneaker-42"
"""The item that three of four come for."""

#: Seconds over which the crowd arrives: everybody at the opening, as fast as one machine can play them.
ARRIVAL = 4.0

_HOT_SHARE = 0.75
_REPEAT_SHARE = 0.2
_DECLINING_SHARE = 0.1


class Manner(StrEnum):
    """How a buyer sends the request."""

    ONCE = "once"
    TWINS = "twins"  #: two or three times at once, as an impatient finger does
    AGAIN = "again"  #: once more after the answer, as a reloaded page does
    LOST = "lost"  #: hangs up before the first answer, and asks again


@dataclass(frozen=True, slots=True)
class Buyer:
    """One customer with one wish and one idempotency key. `arrives` is in seconds from the opening."""

    customer: str
    key: str
    sku: str
    quantity: int
    token: str
    arrives: float
    manner: Manner
    requests: int

    @property
    def good(self) -> bool:
        """Whether the card will be accepted."""
        return not self.token.startswith("tok_declined")


def plan_crowd(lines: Sequence[Line], buyers: int, seed: int) -> list[Buyer]:
    """`buyers` people for these items, in the order of arrival.

    Three of four want the hot item, one unit each; the others spread over the rest as in Zipf's law, by the order of
    the catalogue. A fifth send their request more than once, a tenth have a card that will be declined.
    """
    dice = random.Random(seed)
    others = [line.sku for line in lines if line.sku != HOT]
    weights = [1 / rank for rank in range(1, len(others) + 1)]
    hot = _chosen(dice, buyers, _HOT_SHARE)
    repeating = _chosen(dice, buyers, _REPEAT_SHARE)
    declining = _chosen(dice, buyers, _DECLINING_SHARE)
    arrivals = sorted(dice.uniform(0, ARRIVAL) for _ in range(buyers))
    crowd = []
    for number, arrives in enumerate(arrivals):
        if number in hot:
            sku, quantity = HOT, 1
        else:
            (sku,) = dice.choices(others, weights)
            (quantity,) = dice.choices((1, 2, 3), (7, 2, 1))
        manner = dice.choice((Manner.TWINS, Manner.AGAIN, Manner.LOST)) if number in repeating else Manner.ONCE
        crowd.append(
            Buyer(
                customer=f"c-{number:05d}",
                key=f"{seed}-{number}-{dice.getrandbits(64):016x}",
                sku=sku,
                quantity=quantity,
                token=f"tok_declined_{number}" if number in declining else f"tok_visa_{number}",
                arrives=arrives,
                manner=manner,
                requests=1 if manner is Manner.ONCE else dice.choice((2, 2, 3)),
            )
        )
    return crowd


def hot_units_to_sell(crowd: Sequence[Buyer], stock: int) -> int:
    """How many units of the hot item this crowd must end up with: all, if enough good cards want it."""
    return min(stock, sum(buyer.quantity for buyer in crowd if buyer.sku == HOT and buyer.good))


def _chosen(dice: random.Random, buyers: int, share: float) -> frozenset[int]:
    return frozenset(dice.sample(range(buyers), round(buyers * share)))
