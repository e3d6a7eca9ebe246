"""The audit finds what was broken, and only that. Rows are written as a defect would leave them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import psycopg
import pytest

from ops.audit import AuditIncompleteError, AuditReport, audit
from ops.audit_report import as_json_text
from ops.sandbox import ProviderProcess
from shared.errors import LanesMismatchError
from shared.routing import lane_of
from shared.settings import Settings
from shared.states import FINAL

OPENING = datetime(2026, 1, 5, 9, tzinfo=UTC)
SKU = "lamp"

WAITING = ("queued", "waitlisted")
GIVEN = ("reserved", "charging", "in_doubt", "confirmed", "declined")


def after(seconds: float) -> datetime:
    return OPENING + timedelta(seconds=seconds)


def as_settings(environment: dict[str, str]) -> Settings:
    return Settings.model_validate({name.removeprefix("FAIRLANE_").lower(): v for name, v in environment.items()})


class Books:
    """A sale as rows: writes items and purchases, and charges at the provider."""

    def __init__(self, connection: psycopg.Connection[Any], provider: str) -> None:
        self.connection = connection
        self.provider = provider
        self.seq = 0

    def item(self, sku: str = SKU, *, stock: int, unpaid: int = 0, sold: int = 0, **columns: Any) -> None:
        values = {
            "sku": sku,
            "lane": lane_of(sku, 16),
            "name": sku,
            "price": 100,
            "currency": "EUR",
            "stock": stock,
            "available": stock - unpaid - sold,
            "unpaid": unpaid,
            "hold_seconds": 900,
            "created_at": after(-3600),
            "updated_at": after(-3600),
        } | columns
        self._insert("items", values)

    def purchase(self, status: str, *, quantity: int = 1, sku: str = SKU, **columns: Any) -> UUID:
        """A purchase accepted at the opening and, unless it waits, decided a second later."""
        self.seq += 1
        decided = None if status in WAITING else after(1)
        values: dict[str, Any] = {
            "id": uuid4(),
            "seq": self.seq,
            "client_id": "shop",
            "idempotency_key": f"key-{self.seq}",
            "fingerprint": b"f",
            "item": sku,
            "lane": lane_of(sku, 16),
            "quantity": quantity,
            "customer": f"c-{self.seq}",
            "amount": 100 * quantity,
            "currency": "EUR",
            "status": status,
            "accepted_at": OPENING,
            "decided_at": decided,
        }
        if status in FINAL:
            values["finished_at"] = columns.get("decided_at", decided)
        else:
            values["payment_token"] = "tok_visa"
        if status == "reserved":
            values |= {"due_at": OPENING, "expires_at": OPENING}
        if status in ("charging", "in_doubt", "confirmed", "declined"):
            values |= {"attempt": 1, "fence": self.seq}
        if status in ("charging", "in_doubt"):
            values["call_deadline"] = after(20)
        if status == "in_doubt":
            values |= {"doubt_since": after(20), "ask_at": after(20)}
        if status == "confirmed":
            values["charge_id"] = "ch_none"
        values |= columns
        self._insert("purchases", values)
        return UUID(str(values["id"]))

    def attempt(self, purchase: UUID, outcome: str | None, charge_id: str | None = None, number: int = 1) -> None:
        self._insert(
            "charge_attempts",
            {
                "purchase_id": purchase,
                "attempt": number,
                "fence": purchase.int % 2**62 + number,
                "worker": "w",
                "claimed_at": OPENING,
                "call_deadline": OPENING,
                "outcome": outcome,
                "charge_id": charge_id,
                "recorded_at": None if outcome is None else OPENING,
            },
        )

    async def charge(self, purchase: UUID, token: str = "tok_visa") -> str:
        body = {"reference": purchase.hex, "amount": 100, "currency": "EUR", "customer": "c", "payment_token": token}
        async with aiohttp.ClientSession() as session, session.post(f"{self.provider}/charges", json=body) as answer:
            return str((await answer.json())["id"])

    async def paid(self, **columns: Any) -> UUID:
        """A purchase that is confirmed in good order, on both books."""
        purchase = self.purchase("confirmed", **columns)
        charge_id = await self.charge(purchase)
        self.connection.execute("UPDATE fairlane.purchases SET charge_id = %s WHERE id = %s", (charge_id, purchase))
        self.attempt(purchase, "confirmed", charge_id)
        return purchase

    def _insert(self, table: str, values: dict[str, Any]) -> None:
        names, marks = ", ".join(values), ", ".join(["%s"] * len(values))
        self.connection.execute(
            f"INSERT INTO fairlane.{table} ({names}) VALUES ({marks})",
            list(values.values()),
        )


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path_factory.mktemp("provider"), latency=0) as running:
        yield running


@pytest.fixture
def settings(environment: dict[str, str], provider: ProviderProcess) -> Settings:
    values = environment | {"FAIRLANE_PAYMENT_URL": provider.url}
    return as_settings(values)


@pytest.fixture
def books(environment: dict[str, str], provider: ProviderProcess) -> Iterator[Books]:
    with psycopg.connect(environment["FAIRLANE_DATABASE_URL"], autocommit=True) as connection:
        yield Books(connection, provider.url)


def found(report: AuditReport) -> list[tuple[str, str]]:
    return [(finding.check, finding.subject) for finding in report.findings]


async def test_an_empty_database_is_in_order(settings: Settings) -> None:
    report = await audit(settings)
    assert report.ok
    assert (report.items, report.purchases, report.provider.asked) == ((), {}, 0)


async def test_a_sale_with_every_state_in_good_order(settings: Settings, books: Books) -> None:
    books.item(stock=10, unpaid=7, sold=2, per_customer=2)
    await books.paid(quantity=2)
    books.purchase("reserved", quantity=2)
    books.purchase("charging", quantity=2)
    in_doubt = books.purchase("in_doubt")
    books.purchase("needs_review", quantity=2)
    books.purchase("needs_review", quantity=500, decided_at=None)  # set aside before it got any
    declined = books.purchase("declined")
    await books.charge(declined, "tok_declined")
    books.purchase("limit_reached", quantity=3)
    books.purchase("cancelled", decided_at=None, finished_at=after(1))
    books.purchase("waitlisted", quantity=5)
    books.purchase("sold_out", quantity=900)
    books.purchase("queued")

    report = await audit(settings)

    assert found(report) == []
    (item,) = report.items
    assert (item.held_by_purchases, item.sold_by_purchases, item.oversold) == (7, 2, 0)
    assert report.provider.asked == 4
    assert in_doubt.hex in report.provider.open
    assert len(report.provider.open) == 2
    assert report.purchases["needs_review"] == 2


@pytest.mark.parametrize(
    ("stock", "check"),
    [
        ({"stock": 5, "unpaid": 2, "sold": 1}, "held stock"),
        ({"stock": 5, "unpaid": 0, "sold": 1}, "held stock"),
        ({"stock": 5, "unpaid": 1, "sold": 0}, "sold stock"),
        ({"stock": 5, "unpaid": 1, "sold": 2}, "sold stock"),
    ],
)
async def test_stock_that_its_purchases_do_not_bear_out(
    settings: Settings, books: Books, stock: dict[str, Any], check: str
) -> None:
    books.item(**stock)
    books.purchase("reserved")
    await books.paid()
    assert found(await audit(settings)) == [(check, SKU)]


async def test_more_sold_than_there_was(settings: Settings, books: Books) -> None:
    books.item(stock=1, sold=1)
    await books.paid()
    await books.paid()
    report = await audit(settings)
    assert found(report) == [("sold stock", SKU), ("oversold", SKU)]
    assert report.oversold == 1
    assert json.loads(as_json_text(report))["oversold"] == 1


async def test_items_and_purchases_in_a_lane_that_is_not_theirs(settings: Settings, books: Books) -> None:
    wrong = (lane_of(SKU, 16) + 1) % 16
    books.item(stock=1, lane=wrong)
    books.item("chair", stock=1)
    purchase = books.purchase("queued", sku="chair", lane=(lane_of("chair", 16) + 1) % 16)
    assert found(await audit(settings)) == [("item lane", SKU), ("purchase lane", purchase.hex)]


async def test_a_customer_above_the_limit(settings: Settings, books: Books) -> None:
    books.item(stock=9, unpaid=3, per_customer=2)
    books.purchase("reserved", customer="greedy", quantity=2)
    books.purchase("reserved", customer="greedy")
    report = await audit(settings)
    assert found(report) == [("customer limit", SKU)]
    assert "greedy" in report.findings[0].detail


async def test_a_limit_that_was_lowered_later_accuses_nobody(settings: Settings, books: Books) -> None:
    books.item(stock=9, unpaid=3, per_customer=2, updated_at=after(100))
    books.purchase("reserved", customer="early", quantity=3)
    assert (await audit(settings)).ok


class TestOrder:
    """Who was overtaken, and who only seems to have been."""

    async def test_waiting_while_one_behind_in_the_same_commit_was_served(
        self, settings: Settings, books: Books
    ) -> None:
        books.item(stock=1, unpaid=1)
        overtaken = books.purchase("queued")
        books.purchase("reserved")
        assert found(await audit(settings)) == [("order", overtaken.hex)]

    async def test_served_later_than_one_behind(self, settings: Settings, books: Books) -> None:
        books.item(stock=2, unpaid=2)
        overtaken = books.purchase("reserved", decided_at=after(2))
        books.purchase("reserved", decided_at=after(1))
        assert found(await audit(settings)) == [("order", overtaken.hex)]

    async def test_waiting_while_one_who_came_minutes_later_was_served(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, unpaid=1)
        overtaken = books.purchase("waitlisted")
        books.purchase("reserved", accepted_at=after(120), decided_at=after(121))
        assert found(await audit(settings)) == [("order", overtaken.hex)]

    async def test_a_lower_number_that_may_have_been_committed_late(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, unpaid=1)
        books.purchase("queued", accepted_at=after(0.1))
        books.purchase("reserved", accepted_at=after(0.2))
        assert (await audit(settings)).ok

    async def test_another_item_is_another_line(self, settings: Settings, books: Books) -> None:
        books.item(stock=0)
        books.item("chair", stock=1, unpaid=1)
        books.purchase("waitlisted")
        books.purchase("reserved", sku="chair")
        assert (await audit(settings)).ok


class TestRefused:
    """Refused as sold out, while as much was there."""

    async def test_one_behind_got_as_many_in_the_same_decision(self, settings: Settings, books: Books) -> None:
        books.item(stock=2, unpaid=2)
        refused = books.purchase("sold_out", quantity=2)
        books.purchase("reserved", quantity=2)
        assert found(await audit(settings)) == [("refused too early", refused.hex)]

    async def test_a_smaller_one_behind_got_what_was_too_little(self, settings: Settings, books: Books) -> None:
        books.item(stock=2, unpaid=2)
        books.purchase("sold_out", quantity=3)
        books.purchase("reserved", quantity=2)
        assert (await audit(settings)).ok

    async def test_as_many_were_given_later(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, unpaid=1)
        refused = books.purchase("sold_out", decided_at=after(1))
        books.purchase("reserved", accepted_at=after(0.1), decided_at=after(2))
        assert found(await audit(settings)) == [("refused too early", refused.hex)]

    async def test_a_restock_in_between_explains_it(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, unpaid=1, updated_at=after(1.5))
        books.purchase("sold_out", decided_at=after(1))
        books.purchase("reserved", accepted_at=after(0.1), decided_at=after(2))
        assert (await audit(settings)).ok

    async def test_without_a_waitlist_returned_stock_goes_to_whoever_comes(
        self, settings: Settings, books: Books
    ) -> None:
        books.item(stock=1, unpaid=1, waitlist=False)
        books.purchase("sold_out", decided_at=after(1))
        books.purchase("reserved", accepted_at=after(0.1), decided_at=after(2))
        assert (await audit(settings)).ok


class TestProvider:
    """What the provider's books say."""

    async def test_charged_twice(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, sold=1)
        purchase = await books.paid()
        await books.charge(purchase)
        report = await audit(settings)
        assert found(report) == [("charged twice", purchase.hex)]
        assert report.provider.charged_twice == (purchase.hex,)

    async def test_charged_twice_also_while_in_doubt(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, unpaid=1)
        purchase = books.purchase("in_doubt")
        await books.charge(purchase)
        assert (await audit(settings)).ok  # one charge of a purchase in doubt is what doubt means
        await books.charge(purchase)
        assert found(await audit(settings)) == [("charged twice", purchase.hex)]

    @pytest.mark.parametrize(("status", "unpaid"), [("declined", 0), ("reserved", 1)])
    async def test_paid_but_unconfirmed(self, settings: Settings, books: Books, status: str, unpaid: int) -> None:
        books.item(stock=1, unpaid=unpaid)
        purchase = books.purchase(status, attempt=1)
        await books.charge(purchase)
        report = await audit(settings)
        assert found(report) == [("paid but unconfirmed", purchase.hex)]
        assert report.provider.paid_but_unconfirmed == (purchase.hex,)

    async def test_confirmed_without_a_charge(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, sold=1)
        purchase = books.purchase("confirmed", charge_id="ch_invented")
        books.attempt(purchase, "confirmed", "ch_invented")
        assert found(await audit(settings)) == [("confirmed, not charged", purchase.hex)]

    async def test_confirmed_with_another_charge(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, sold=1)
        purchase = books.purchase("confirmed", charge_id="ch_other")
        books.attempt(purchase, "confirmed", "ch_other")
        await books.charge(purchase)
        assert found(await audit(settings)) == [("confirmed, not charged", purchase.hex)]

    async def test_attempts_that_do_not_bear_out_the_purchase(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, sold=1)
        purchase = await books.paid()
        books.attempt(purchase, "confirmed", "ch_second", number=2)
        assert found(await audit(settings)) == [("attempts", purchase.hex)]

    async def test_more_purchases_than_are_asked_about_at_once(
        self, settings: Settings, books: Books, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ops.audit._ASKED", 2)
        books.item(stock=9, sold=4)
        purchases: Sequence[UUID] = [await books.paid() for _ in range(5)]
        books.connection.execute("UPDATE fairlane.items SET available = 4")
        for purchase in purchases[::4]:
            await books.charge(purchase)
        report = await audit(settings)
        assert report.provider.asked == 5
        assert found(report) == [("charged twice", purchase.hex) for purchase in purchases[::4]]

    async def test_a_silent_provider_leaves_the_audit_incomplete(
        self, environment: dict[str, str], books: Books
    ) -> None:
        books.item(stock=1, sold=1)
        await books.paid()
        settings = as_settings(environment)
        with pytest.raises(AuditIncompleteError, match="no answer"):
            await audit(settings)


async def test_a_database_laid_out_otherwise_is_not_audited(settings: Settings) -> None:
    with pytest.raises(LanesMismatchError):
        await audit(settings.model_copy(update={"lanes": 8}))


async def test_it_changes_nothing_and_waits_for_nobody(settings: Settings, books: Books) -> None:
    books.item(stock=1, sold=1)
    await books.paid()
    with books.connection.transaction():
        books.connection.execute("UPDATE fairlane.items SET name = 'held by somebody else'")
        report = await asyncio.wait_for(audit(settings), timeout=30)
    assert report.ok
