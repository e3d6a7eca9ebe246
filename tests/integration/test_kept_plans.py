"""A worker keeps its plans: those of a quiet hour, when the tables were small, must still be good in the rush.

Postgres plans a prepared statement anew when a table was analyzed, which takes a minute or more to come. Until then a
plan that reads a whole table, because that had a dozen rows, reads it for every batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import psycopg
import pytest
from psycopg.rows import scalar_row
from sqlalchemy import TextClause, create_engine

from shared.database import LIMITS, limits, literal
from shared.statements import accept, admit, cancel, charge, decide, recover, review, sweep
from tests.integration.plans import FEW, FILL, REFUSALS, RUSH, looked_at, newest
from tests.integration.shopfloor import Shop

#: Nobody has bought yet; or a dozen have, and the tables were vacuumed since.
NOTHING = "SELECT 1"
A_DOZEN = """
INSERT INTO fairlane.items (sku, lane, name, price, currency, stock, available, hold_seconds)
SELECT 'few-' || n, 3, 'n', 500, 'EUR', 100, 100, 900 FROM generate_series(1, 12) n;
INSERT INTO fairlane.purchases
    (id, seq, client_id, idempotency_key, item, lane, quantity, customer, amount, currency, status, decided_at,
     finished_at)
SELECT gen_random_uuid(), 200000 + n, 'shop', 'few-' || n, 'few-' || n, 3, 1, 'c', 500, 'EUR', 'sold_out', now(), now()
FROM generate_series(1, 12) n;
INSERT INTO fairlane.purchase_keys (client_id, idempotency_key, purchase_id, fingerprint)
SELECT client_id, idempotency_key, id, '' FROM fairlane.purchases;
INSERT INTO fairlane.charge_attempts (purchase_id, attempt, fence, worker, claimed_at, call_deadline)
SELECT id, 1, seq, 'w', now(), now() FROM fairlane.purchases;
"""
VACUUM = "VACUUM (ANALYZE) fairlane.items, fairlane.purchases, fairlane.purchase_keys, fairlane.charge_attempts"
#: Beside what the other tests of plans fill in: many items, and one that many wait for.
MORE = """
INSERT INTO fairlane.items (sku, lane, name, price, currency, stock, available, hold_seconds)
SELECT 'other-' || n, 5, 'n', 500, 'EUR', 100, 100, 900 FROM generate_series(1, 10000) n;
INSERT INTO fairlane.purchases
    (id, seq, client_id, idempotency_key, item, lane, quantity, customer, payment_token, amount, currency, status)
SELECT gen_random_uuid(), 300000 + n, 'shop', 'waits-' || n, 'sku-19', 3, 1, 'c-' || n, 'tok', 500, 'EUR', 'waitlisted'
FROM generate_series(1, 20000) n;
SELECT setval('fairlane.purchase_seq', 1000000), setval('fairlane.fence_seq', 1000000)
"""

Given = Mapping[str, Any]

#: Writes parameters as PREPARE has them.
_NUMBERED: Final = create_engine("postgresql+psycopg://", paramstyle="numeric_dollar").dialect
SKUS: Final = ["sku-3", "sku-4", "sku-19"]
CLAIM: Final = {"slots": FEW, "worker": "w", "overdue_after": 20.0}


def questions(ids: Mapping[str, Sequence[str]]) -> dict[str, tuple[TextClause, Given]]:
    """Every statement of a hot path, and what it is given."""
    queued, confirmed, doubtful = ids["queued"], ids["confirmed"], ids["in_doubt"]
    results = json.dumps(
        [
            {"id": each, "fence": 1, "status": "confirmed", "outcome": "confirmed", "charge_id": "ch"}
            for each in confirmed
        ]
    )
    orders = json.dumps(
        [
            {
                "id": f"{n:032x}",
                "client_id": "shop",
                "idempotency_key": f"new-{n}",
                "fingerprint": "\\x00",
                "item": SKUS[n % 3],
                "quantity": 1,
                "customer": "c",
                "payment_token": "tok",
            }
            for n in range(FEW)
        ]
    )
    known = json.dumps([{"client_id": "shop", "idempotency_key": f"rush-{n}"} for n in range(FEW)])
    return {
        "accepting": (accept.INSERT, {"orders": orders}),
        "purchases by key": (accept.BY_KEY, {"keys": known}),
        "purchases by id": (accept.BY_ID, {"ids": queued}),
        "doors": (admit.DOORS, {"skus": SKUS}),
        "the head of a lane": (decide.READ_QUEUED, {"lane": 3, "batch": FEW}),
        "the waitlists of a lane": (decide.WAITLISTS, {"lane": 3}),
        "the heads of waitlists": (decide.READ_WAITLISTED, {"lane": 3, "items": SKUS, "batch": FEW}),
        "the ends of waitlists": (decide.LAST_WAITLISTED, {"lane": 3, "skus": SKUS}),
        "items to decide": (decide.LOCK_ITEMS, {"skus": SKUS}),
        "what customers hold": (
            decide.HOLDINGS,
            {"items": ["sku-3"] * 50, "clients": ["shop"] * 50, "customers": [f"c-{n}" for n in range(50)]},
        ),
        "verdicts": (decide.WRITE_VERDICTS, {"ids": queued, **REFUSALS}),
        "stock taken": (decide.TAKE_STOCK, {"skus": SKUS, "taken": [0, 0, 0]}),
        "a claim": (charge.CLAIM, CLAIM),
        "a claim for a known charge": (charge.CLAIM_AGAIN, {"ids": ids["reserved"], "workers": ["w"] * FEW}),
        "purchases to record": (charge.LOCK_PURCHASES, {"ids": confirmed}),
        "purchases that exist": (charge.EXISTING, {"ids": confirmed}),
        "outcomes": (charge.RECORD, {"results": results, "ids": confirmed}),
        "where purchases stand": (charge.STANDING, {"ids": confirmed, "fences": [1] * FEW}),
        "attempts": (charge.RECORD_ATTEMPTS, {"results": results, "ids": confirmed, "skus": SKUS}),
        "items to settle": (charge.LOCK_ITEMS, {"skus": SKUS}),
        "stock settled": (charge.SETTLE_STOCK, {"skus": SKUS, "returned": [0, 0, 0], "sold": [0, 0, 0]}),
        "lanes to call after holds ended": (charge.LANES_WITH_WAITLISTS, {"skus": SKUS}),
        "a purchase to cancel": (cancel.LOCK, {"id": queued[0], "client": "shop"}),
        "a cancellation": (cancel.CANCEL, {"id": queued[0]}),
        "the lanes that were forgotten": (sweep.LANES, {}),
        "all waitlists that move": (sweep.LANES_WITH_MOVING_WAITLISTS, {}),
        "what there is to do": (sweep.DUE, {}),
        "claims without an outcome": (recover.MARK_IN_DOUBT, {"batch": FEW}),
        "holds that ran out": (recover.EXPIRE, {"batch": FEW, "item": None}),
        "questions to the provider": (recover.CLAIM_QUESTIONS, {"batch": FEW, "lease": 15.0, "settle_window": 60.0}),
        "questions put off": (
            recover.POSTPONE,
            {"ids": doubtful, "fences": [1] * FEW, "pauses": [1.0] * FEW},
        ),
        "attempts to ask about again": (recover.CLAIM_RECHECKS, {"batch": FEW}),
        "what only an operator can settle": (review.IN_REVIEW, {"id": None}),
    }


class Worker:
    """A connection that keeps a plan of each statement, made once."""

    def __init__(self, shop: Shop) -> None:
        # Values are put into the text here: EXECUTE takes no parameters.
        self._connection = psycopg.connect(
            shop.database_url, autocommit=True, cursor_factory=psycopg.ClientCursor[Any], row_factory=scalar_row
        )
        self._connection.execute("SET plan_cache_mode = force_generic_plan")
        self._limits = literal(LIMITS, limits(shop.settings)).encode()
        self._prepared: dict[str, tuple[str, list[str]]] = {}

    def prepare(self, name: str, statement: TextClause) -> None:
        """Prepare a statement under a name of its own."""
        compiled = statement.compile(dialect=_NUMBERED)
        order = list(compiled.positiontup or ())
        handle = f"q{len(self._prepared)}"
        self._connection.execute(f"PREPARE {handle} AS {compiled}".replace("%", "%%").encode())
        self._prepared[name] = handle, order

    def explain(self, name: str, given: Given) -> Mapping[str, Any]:
        """Execute it, undo that, and return its plan with what was read."""
        handle, order = self._prepared[name]
        places = f"({', '.join(['%s'] * len(order))})" if order else ""
        with self._connection.transaction(force_rollback=True):
            self._connection.execute(self._limits)
            told = self._connection.execute(
                f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE {handle}{places}".encode(), [given[each] for each in order]
            ).fetchone()
        assert told is not None
        plan: Mapping[str, Any] = told[0]["Plan"]
        return plan

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@pytest.fixture
def worker(shop: Shop) -> Iterator[Worker]:
    keeping = Worker(shop)
    yield keeping
    keeping.close()


@pytest.mark.parametrize("before", [NOTHING, A_DOZEN], ids=["empty", "a-dozen"])
async def test_a_plan_of_a_quiet_hour_reads_no_more_in_the_rush_than_it_is_asked_for(
    shop: Shop, worker: Worker, subtests: pytest.Subtests, before: str
) -> None:
    shop.sql(before)
    shop.sql(VACUUM)
    nobody = {status: ["0" * 32] for status in ("queued", "reserved", "confirmed", "in_doubt")}
    for name, (statement, given) in questions(nobody).items():
        worker.prepare(name, statement)
        worker.explain(name, given)

    shop.sql("DELETE FROM fairlane.purchase_keys; DELETE FROM fairlane.charge_attempts")  # FILL has keys for everybody.
    shop.sql(FILL.partition("ANALYZE")[0])
    shop.sql(RUSH)
    shop.sql(MORE)
    for name, (_, given) in questions(newest(shop)).items():
        with subtests.test(name):
            # A sort by a second column reads on until the first one changes.
            plan = worker.explain(name, given)
            # There is one row for each lane, and the sweep asks for all.
            assert [read for read in looked_at(plan) if read[0] != "lanes" and read[2] > 1.1 * FEW] == [], plan
