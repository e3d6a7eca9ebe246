"""What became of all promises, recomputed from the books of Postgres and of the provider."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ops.audit import audit
from shared.states import FINAL
from tests.chaos.buyers import NEVER_CHARGED, Heard
from tests.faults.floor import Floor

_PURCHASES = """
SELECT idempotency_key AS key, replace(id::text, '-', '') AS id, item, quantity, customer, status, reason, charge_id,
    (SELECT json_agg(a ORDER BY a.attempt) FROM fairlane.charge_attempts a WHERE a.purchase_id = p.id) AS attempts
FROM fairlane.purchases p ORDER BY seq
"""


@dataclass(frozen=True)
class Verdict:
    """Every list names what broke a promise; all of them are empty when all is well."""

    purchases: Counter[str]
    #: Acknowledged, and now unknown or under another id.
    lost: list[str] = field(default_factory=list)
    oversold: list[str] = field(default_factory=list)
    charged_twice: list[str] = field(default_factory=list)
    #: Had stock, and lost it though their payment would have been taken.
    winners_lost: list[str] = field(default_factory=list)
    not_final: list[str] = field(default_factory=list)
    #: Confirmed without a charge or by another one; charged and not confirmed.
    books_differ: list[str] = field(default_factory=list)
    #: Customers who got more of an item than one may have.
    over_the_limit: list[str] = field(default_factory=list)
    #: Answers that contradict each other or the end.
    told_wrong: list[str] = field(default_factory=list)
    audit: list[str] = field(default_factory=list)
    ended_alone: list[str] = field(default_factory=list)

    @property
    def broken(self) -> dict[str, list[str]]:
        """The promises that were broken, and by what."""
        return {name: value for name, value in asdict(self).items() if name != "purchases" and value}


async def judge(floor: Floor, heard: Heard, ended_alone: Sequence[tuple[str, str]]) -> Verdict:
    """Compare everything with everything. Nothing must be under way any more."""
    rows = {row["key"]: row for row in floor.rows(_PURCHASES)}
    report = await audit(floor.settings)
    charged: dict[str, list[str]] = {}
    for line in floor.provider.ledger_file.read_text().splitlines():
        charge = json.loads(line)
        if charge["status"] == "succeeded":
            charged.setdefault(charge["reference"], []).append(charge["id"])
    confirmed = {row["id"]: [row["charge_id"]] for row in rows.values() if row["status"] == "confirmed"}
    told = {row["id"]: row["status"] for row in rows.values()}
    return Verdict(
        purchases=Counter(row["status"] for row in rows.values()),
        lost=[f"{key}: {id}" for key, id in heard.accepted.items() if rows.get(key, {}).get("id") != id],
        oversold=_oversold(floor, rows),
        charged_twice=[f"{reference}: {ids}" for reference, ids in charged.items() if len(ids) > 1],
        winners_lost=[_described(row) for row in rows.values() if _lost_to_a_fault(row, heard)],
        not_final=[_described(row) for row in rows.values() if row["status"] not in FINAL],
        books_differ=[
            f"{id}: charged {charged.get(id)}, confirmed {confirmed.get(id)}"
            for id in sorted(charged.keys() | confirmed.keys())
            if charged.get(id) != confirmed.get(id)
        ],
        over_the_limit=_over_the_limit(rows, heard),
        told_wrong=heard.wrong
        + [
            f"{id} was told {said.status}, is {told.get(id)}"
            for id, said in heard.told.items()
            if told.get(id) != said.status
        ],
        audit=[f"{finding.check}: {finding.subject} {finding.detail}" for finding in report.findings],
        ended_alone=[f"{name}: {said}" for name, said in ended_alone],
    )


def _oversold(floor: Floor, rows: dict[str, Any]) -> list[str]:
    sold = Counter[str]()
    for row in rows.values():
        sold[row["item"]] += row["quantity"] if row["status"] == "confirmed" else 0
    stock = {row["sku"]: row["stock"] for row in floor.rows("SELECT sku, stock FROM fairlane.items")}
    return [f"{sku}: {count} of {stock.get(sku)}" for sku, count in sold.items() if count > stock.get(sku, 0)]


def _lost_to_a_fault(row: dict[str, Any], heard: Heard) -> bool:
    """Nobody's hold is so short that it runs out by itself, and only some payments are never charged by themselves."""
    if row["status"] == "declined":
        return row["reason"] == "not_charged" and heard.tokens.get(row["key"]) not in NEVER_CHARGED
    return row["status"] in ("expired", "cancelled")


def _over_the_limit(rows: dict[str, Any], heard: Heard) -> list[str]:
    bought = Counter[tuple[str, str]]()
    for row in rows.values():
        bought[row["item"], row["customer"]] += row["quantity"] if row["status"] == "confirmed" else 0
    return [
        f"{customer}: {count} of {sku}"
        for (sku, customer), count in bought.items()
        if count > heard.limits.get(sku, count)
    ]


def _described(row: dict[str, Any]) -> str:
    return json.dumps(row, default=str)
