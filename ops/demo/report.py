"""The end of a demo: what was sold, what went wrong, how long it took, beside the locked way."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ops.audit import AuditReport
from ops.demo.buying import Crowd, Visit
from ops.demo.crowd import ARRIVAL, HOT
from ops.demo.locked_way import LockedSale
from ops.demo.stage import LATENCY
from shared.states import FINAL

#: Only the first few of a kind are named; the audit has said them all.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """A sale, as the audit, the database and the buyers saw it.

    `statuses` is the state on record of every purchase a buyer was told of; `hot_seconds` is from the first acceptance
    to the last payment of the hot item.
    """

    crowd: Crowd
    audit: AuditReport
    statuses: Mapping[str, str]
    charged_twice: Sequence[str]
    hot_stock: int
    hot_expected: int
    hot_seconds: float

    @property
    def hot_sold(self) -> int:
        """Units of the hot item that were paid for."""
        return next((item.sold_by_purchases for item in self.audit.items if item.sku == HOT), 0)

    @property
    def lost(self) -> list[str]:
        """Purchases that a buyer was told of and that are gone, or not at an end."""
        return [
            purchase
            for visit in self.crowd.visits
            for purchase in sorted(visit.ids)
            if self.statuses.get(purchase) not in FINAL
        ]

    @property
    def told_otherwise(self) -> list[str]:
        """Purchases whose buyer was told another end than the one on record."""
        return [
            purchase
            for visit in self.crowd.visits
            for purchase in visit.ids
            if visit.final and purchase in self.statuses and self.statuses[purchase] != visit.status
        ]

    @property
    def doubled_keys(self) -> list[str]:
        """Idempotency keys that were given two purchases."""
        return [visit.buyer.key for visit in self.crowd.visits if len(visit.ids) > 1]

    def broken(self) -> list[str]:
        """Every invariant that does not hold, in words; empty when all is well."""
        said = [f"{finding.check}: {finding.subject}: {finding.detail}" for finding in self.audit.findings[:_NAMED]]
        if (more := len(self.audit.findings) - _NAMED) > 0:
            said.append(f"and {more} more findings of the audit")
        if self.hot_sold != self.hot_expected:
            said.append(f"{HOT}: {self.hot_sold} units sold, {self.hot_expected} must be")
        lists: dict[str, Sequence[str]] = {
            "accepted, but not at an end": self.lost,
            "told otherwise than recorded": self.told_otherwise,
            "one key, two purchases": self.doubled_keys,
            "charged twice, by the provider's ledger": self.charged_twice,
        }
        for name, found in lists.items():
            if found:
                said.append(f"{name}: {len(found)}, among them {', '.join(found[:_NAMED])}")
        return said


def print_outcome(console: Console, outcome: Outcome, locked: LockedSale) -> None:
    """The final table, and every broken invariant below it."""
    crowd = outcome.crowd
    visits = crowd.visits
    settled = sum(visit.final for visit in visits)
    hot_rate = outcome.hot_sold / outcome.hot_seconds if outcome.hot_seconds > 0 else 0.0
    table = Table(title="The sale", title_justify="left", caption=_terms(outcome), caption_justify="left")
    table.add_column()
    table.add_column("lanes", justify="right")
    table.add_column("a lock per item", justify="right")
    rows = [
        (f"sold of {HOT}", f"{outcome.hot_sold} of {outcome.hot_stock}", f"{locked.sold} in {locked.seconds:g} s"),
        ("units sold per second, that item", f"{hot_rate:.0f}", f"{locked.rate:.0f}"),
        ("oversold", str(outcome.audit.oversold), ""),
        ("charged twice", str(len(set(outcome.charged_twice) | set(outcome.audit.provider.charged_twice))), ""),
        ("paid but unconfirmed", str(len(outcome.audit.provider.paid_but_unconfirmed)), ""),
        ("lost (accepted, not at an end)", str(len(outcome.lost)), ""),
        ("one key, two purchases", str(len(outcome.doubled_keys)), ""),
        ("waited for the lock in vain", "", str(locked.gave_up)),
        ("purchases settled per second, all items", f"{settled / crowd.seconds:.0f}" if crowd.seconds else "", ""),
        ("accepted after, p50 / p99", _latency(crowd.tally.accept_seconds), ""),
        ("accepted to final, p50 / p99", _latency(v.final_seconds for v in visits), ""),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    _print_crowd(console, visits, crowd)
    broken = outcome.broken()
    for line in broken:
        console.print(f"BROKEN  {line}", style="bold red", markup=False)
    if not broken:
        console.print("Every invariant holds.", style="bold green")


def _print_crowd(console: Console, visits: Sequence[Visit], crowd: Crowd) -> None:
    ends = Counter(visit.status or "gave up asking" for visit in visits)
    said = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in ends.most_common())
    trouble = ", ".join(f"{count} × {name}" for name, count in crowd.tally.trouble.items()) or "none"
    console.print(f"Buyers: {said}. Requests: {crowd.tally.requests}; asked again after trouble: {trouble}.")


def _terms(outcome: Outcome) -> str:
    buyers = len(outcome.crowd.visits)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{buyers:,} buyers within {ARRIVAL:g} s, payments of {LATENCY * 1000:.0f} ms; everything, the buyers too, "
        f"on the {cores} cores of this machine.\n"
        "The lock is redis-py's Lock with the library's defaults, a lease of 30 s, and up to 10 s of waiting for it."
    )


def _latency(seconds: object) -> str:
    known = sorted(value for value in seconds if value is not None)  # type: ignore[attr-defined]
    if not known:
        return "-"
    return " / ".join(_duration(known[min(len(known) - 1, int(len(known) * share))]) for share in (0.5, 0.99))


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
