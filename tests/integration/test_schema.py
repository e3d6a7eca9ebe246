"""The schema on a real Postgres: made once by whoever comes, and it refuses what no row may say."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import text

from shared.database import check_lanes, make_engine
from shared.errors import LanesMismatchError, SettingsError
from shared.migrate import head_revision, migrate
from shared.settings import Settings
from shared.states import FINAL, HOLDING, Status
from tests.integration.shopfloor import Shop

ID = UUID(int=1)
NOW = "2026-01-31 09:00:00+00"

ITEM = {
    "sku": "sku-9",
    "lane": 3,
    "name": "n",
    "price": 500,
    "currency": "EUR",
    "stock": 10,
    "available": 6,
    "unpaid": 2,
    "hold_seconds": 900,
}

WAITING = {
    "id": ID,
    "seq": 1,
    "client_id": "shop",
    "idempotency_key": "k",
    "item": "sku-1",
    "lane": 3,
    "quantity": 1,
    "customer": "c",
    "payment_token": "tok",
    "amount": 500,
    "currency": "EUR",
    "status": "queued",
}
KEY = {"client_id": "shop", "idempotency_key": "k", "purchase_id": ID, "fingerprint": b"f"}
HELD = {**WAITING, "status": "reserved", "decided_at": NOW, "due_at": NOW, "expires_at": NOW}
CALLED = {**HELD, "status": "charging", "due_at": None, "attempt": 1, "fence": 7, "call_deadline": NOW}
ENDED = {"payment_token": None, "finished_at": NOW}

#: For every status a row as Fairlane writes it.
VALID: dict[Status, dict[str, Any]] = {
    Status.QUEUED: WAITING,
    Status.WAITLISTED: {**WAITING, "status": "waitlisted"},
    Status.RESERVED: HELD,
    Status.CHARGING: CALLED,
    Status.IN_DOUBT: {**CALLED, "status": "in_doubt", "doubt_since": NOW, "ask_at": NOW},
    Status.NEEDS_REVIEW: {**WAITING, "status": "needs_review"},
    Status.CONFIRMED: {**CALLED, **ENDED, "status": "confirmed", "charge_id": "ch_1"},
    Status.DECLINED: {**CALLED, **ENDED, "status": "declined", "charge_id": "ch_1"},
    Status.SOLD_OUT: {**WAITING, **ENDED, "status": "sold_out", "decided_at": NOW},
    Status.LIMIT_REACHED: {**WAITING, **ENDED, "status": "limit_reached", "decided_at": NOW},
    Status.CANCELLED: {**WAITING, **ENDED, "status": "cancelled"},
    Status.EXPIRED: {**WAITING, **ENDED, "status": "expired"},
}
ATTEMPT = {"purchase_id": ID, "attempt": 1, "fence": 7, "worker": "w", "claimed_at": NOW, "call_deadline": NOW}

#: Nobody comes here without a claim. An operator may decline what was set aside before its decision.
CLAIMED = (Status.CHARGING, Status.IN_DOUBT, Status.CONFIRMED)


def insert(shop: Shop, table: str, row: dict[str, Any]) -> None:
    columns = ", ".join(row)
    shop.sql(f"INSERT INTO fairlane.{table} ({columns}) VALUES ({', '.join(['%s'] * len(row))})", *row.values())


def violations() -> list[tuple[str, dict[str, Any], str]]:
    """(table, a row that must be refused, the constraint that refuses it)."""
    purchase = [
        (WAITING | {"quantity": 0}, "purchases_quantity_check"),
        (WAITING | {"quantity": 1_001}, "purchases_quantity_check"),
        (WAITING | {"amount": -1}, "purchases_amount_check"),
        (WAITING | {"item": "unknown"}, "purchases_item_fkey"),
        (WAITING | {"status": "nearly", "decided_at": NOW}, "known_status"),
        (WAITING | {"decided_at": NOW}, "undecided_while_waiting"),
        (VALID[Status.WAITLISTED] | {"decided_at": NOW}, "undecided_while_waiting"),
        (HELD | {"due_at": None}, "due_when_reserved"),
        (HELD | {"expires_at": None}, "due_when_reserved"),
        *((VALID[each] | {"finished_at": None}, "finished_when_final") for each in sorted(FINAL)),
        *((VALID[each] | {"finished_at": NOW}, "finished_when_final") for each in sorted(set(Status) - FINAL)),
        *((VALID[each] | {"payment_token": "tok"}, "token_erased_when_final") for each in sorted(FINAL)),
        *((VALID[each] | {"payment_token": None}, "token_erased_when_final") for each in sorted(set(Status) - FINAL)),
        *(
            (VALID[each] | {"decided_at": None}, "decided_when_settled")
            for each in Status
            if VALID[each].get("decided_at")
        ),
        *((VALID[each] | {"fence": None}, "claimed_with_a_fence") for each in CLAIMED),
        *((VALID[each] | {"attempt": 0}, "claimed_with_a_fence") for each in CLAIMED),
        *(
            (VALID[each] | {"call_deadline": None}, "called_with_a_deadline")
            for each in (Status.CHARGING, Status.IN_DOUBT)
        ),
        (VALID[Status.CONFIRMED] | {"charge_id": None}, "charged_when_confirmed"),
        (VALID[Status.IN_DOUBT] | {"doubt_since": None}, "asked_while_in_doubt"),
        (VALID[Status.IN_DOUBT] | {"ask_at": None}, "asked_while_in_doubt"),
        *(
            (VALID[each] | {"charge_id": "ch_1"}, "charge_only_when_paid_for")
            for each in sorted(set(Status) - {Status.CONFIRMED, Status.DECLINED})
        ),
    ]
    item = [
        (ITEM | {"sku": ""}, "items_sku_check"),
        (ITEM | {"sku": "s" * 65}, "items_sku_check"),
        (ITEM | {"sku": "a b"}, "items_sku_check"),
        (ITEM | {"sku": "a\nb"}, "items_sku_check"),
        (ITEM | {"sku": "sku-1"}, "items_pkey"),
        (ITEM | {"lane": 99}, "items_lane_fkey"),
        (ITEM | {"price": -1}, "items_price_check"),
        (ITEM | {"currency": "eur"}, "items_currency_check"),
        (ITEM | {"per_customer": 0}, "items_per_customer_check"),
        (ITEM | {"hold_seconds": 0}, "items_hold_seconds_check"),
        (ITEM | {"opens_at": NOW, "closes_at": NOW}, "items_check"),
        (ITEM | {"available": -1}, "never_oversold"),
        (ITEM | {"unpaid": -1}, "never_oversold"),
        (ITEM | {"available": 9, "unpaid": 2}, "never_oversold"),
    ]
    attempt = [
        (ATTEMPT | {"attempt": 0}, "charge_attempts_attempt_check"),
        (ATTEMPT | {"outcome": "perhaps", "recorded_at": NOW}, "known_outcome"),
        (ATTEMPT | {"outcome": "confirmed"}, "recorded_with_its_time"),
        (ATTEMPT | {"recorded_at": NOW}, "recorded_with_its_time"),
        (ATTEMPT | {"purchase_id": UUID(int=2)}, "charge_attempts_purchase_id_fkey"),
    ]
    return [
        *(("purchases", row, name) for row, name in purchase),
        *(("items", row, name) for row, name in item),
        *(("charge_attempts", row, name) for row, name in attempt),
    ]


#: (table, a row to begin with, a second that must be refused beside it, the constraint).
TWINS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("purchases", WAITING, WAITING | {"seq": 2, "idempotency_key": "k2"}, "purchases_pkey"),
    ("purchases", WAITING, WAITING | {"id": UUID(int=2), "idempotency_key": "k2"}, "purchases_seq_key"),
    ("purchase_keys", KEY, KEY | {"purchase_id": UUID(int=2)}, "one_key_one_purchase"),
    ("charge_attempts", ATTEMPT, ATTEMPT | {"fence": 8}, "charge_attempts_pkey"),
    ("charge_attempts", ATTEMPT, ATTEMPT | {"attempt": 2}, "charge_attempts_fence_key"),
]


async def test_every_status_has_a_row_that_is_taken(shop: Shop) -> None:
    await shop.item()
    for number, row in enumerate(VALID.values()):
        insert(shop, "purchases", row | {"id": UUID(int=number), "seq": number, "idempotency_key": f"k-{number}"})
    insert(shop, "items", ITEM)

    assert sorted(shop.statuses()) == sorted(Status)


async def test_every_row_that_breaks_a_rule_is_refused_by_that_rule(shop: Shop, subtests: pytest.Subtests) -> None:
    await shop.item()
    insert(shop, "purchases", WAITING | {"id": ID, "seq": 0, "idempotency_key": "first"})
    for table, row, constraint in violations():
        unique = {"id": UUID(int=9)} if table == "purchases" else {}
        with subtests.test(f"{table}: {constraint}", row=str(row)):
            with pytest.raises(psycopg.errors.IntegrityError) as refused:
                insert(shop, table, row | unique)
            assert refused.value.diag.constraint_name == constraint


async def test_every_twin_is_refused(shop: Shop, subtests: pytest.Subtests) -> None:
    await shop.item()
    for table, first, second, constraint in TWINS:
        with subtests.test(constraint):
            shop.sql("TRUNCATE fairlane.charge_attempts, fairlane.purchases, fairlane.purchase_keys")
            if table == "charge_attempts":
                insert(shop, "purchases", WAITING)
            insert(shop, table, first)
            with pytest.raises(psycopg.errors.UniqueViolation) as refused:
                insert(shop, table, second)
            assert refused.value.diag.constraint_name == constraint


async def test_no_constraint_is_without_a_test(shop: Shop) -> None:
    rows = shop.sql(
        "SELECT conname FROM pg_constraint WHERE connamespace = 'fairlane'::regnamespace AND contype <> 'n'"
    )

    tested = {name for _, _, name in violations()} | {name for _, _, _, name in TWINS}
    # The lanes' key is Postgres' own word for "one row per lane"; Alembic brings the other.
    assert {row["conname"] for row in rows} - {"lanes_pkey", "alembic_version_pkc"} == tested


def definition(shop: Shop, constraint: str) -> set[str]:
    """The states named in a CHECK."""
    (row,) = shop.sql("SELECT pg_get_constraintdef(oid) AS text FROM pg_constraint WHERE conname = %s", constraint)
    return set(re.findall(r"'([a-z_]+)'", row["text"]))


def test_the_database_knows_the_same_states_as_the_code(shop: Shop) -> None:
    assert definition(shop, "known_status") == set(Status)
    assert definition(shop, "finished_when_final") == FINAL
    assert definition(shop, "token_erased_when_final") == FINAL
    (held,) = shop.sql("SELECT indexdef FROM pg_indexes WHERE indexname = 'purchases_held'")
    assert set(re.findall(r"'([a-z_]+)'", held["indexdef"])) == HOLDING


def test_migrating_again_changes_nothing(shop: Shop) -> None:
    shop.sql("UPDATE fairlane.lanes SET decided_through = 7 WHERE lane = 3")
    before = shop.sql("SELECT * FROM fairlane.lanes ORDER BY lane")

    assert migrate(shop.settings) == head_revision()
    assert shop.sql("SELECT * FROM fairlane.lanes ORDER BY lane") == before
    assert shop.sql("SELECT version_num FROM fairlane.alembic_version") == [{"version_num": head_revision()}]


def empty(shop: Shop) -> None:
    shop.sql("DROP SCHEMA fairlane CASCADE")


def test_two_who_migrate_an_empty_database_at_once_take_turns(shop: Shop) -> None:
    empty(shop)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(migrate, [shop.settings] * 4)) == [head_revision()] * 4

    assert [row["lane"] for row in shop.sql("SELECT lane FROM fairlane.lanes ORDER BY lane")] == list(range(16))


@pytest.mark.parametrize("lanes", [8, 17])
def test_a_database_of_another_number_of_lanes_is_refused_unchanged(shop: Shop, lanes: int) -> None:
    settings = shop.with_settings(lanes=lanes)
    with pytest.raises(LanesMismatchError, match=f"FAIRLANE_LANES: is {lanes}, but .* 16 lanes"):
        migrate(settings)

    assert shop.sql("SELECT count(*) AS lanes FROM fairlane.lanes") == [{"lanes": 16}]
    with pytest.raises(LanesMismatchError):
        check(settings)


def check(settings: Settings) -> None:
    engine = make_engine(settings)
    try:
        with engine.connect() as connection:
            check_lanes(connection, settings.lanes)
    finally:
        engine.dispose()


def test_a_database_that_was_not_migrated_is_refused_with_one_line(shop: Shop) -> None:
    check(shop.settings)
    empty(shop)
    with pytest.raises(SettingsError, match="fairlane migrate") as refused:
        check(shop.settings)

    assert "\n" not in str(refused.value)


def test_item_names_compare_by_bytes_as_in_python(shop: Shop) -> None:
    names = ["a", "B", "a-b", "ab", "A.b", "_", "Z", "z"]
    engine = make_engine(shop.settings)
    with engine.connect() as connection:
        found = connection.execute(
            text('SELECT x FROM unnest(CAST(:names AS text[])) AS x ORDER BY x COLLATE "C"'), {"names": names}
        )
        assert list(found.scalars()) == sorted(names)
    engine.dispose()
    (row,) = shop.sql(
        "SELECT collation_name FROM information_schema.columns WHERE table_name = 'items' AND column_name = 'sku'"
    )
    assert row["collation_name"] == "C"
