"""The audit finds what was broken, and only that. Rows are written as a defect would leave them."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID, uuid4

import aiohttp
import psycopg
import pytest
from rich.console import Console
from sqlalchemy import RowMapping, TextClause, text

from ops.audit import AuditIncompleteError, AuditReport, audit
from ops.audit_report import as_json_text, print_report
from ops.audit_stuck import LINES, Bounds, find_stuck
from ops.review import DECLINED_BY_OPERATOR
from ops.sandbox import ProviderProcess
from shared.database import make_async_engine
from shared.errors import LanesMismatchError
from shared.routing import lane_of
from shared.settings import Settings
from shared.states import FINAL

SKU = "lamp"

WAITING = ("queued", "waitlisted")
CHARGED = ("charging", "in_doubt", "confirmed", "declined")


def as_settings(environment: dict[str, str]) -> Settings:
    return Settings.model_validate({name.removeprefix("FAIRLANE_").lower(): v for name, v in environment.items()})


class Books:
    """A sale as rows: writes items and purchases, and charges at the provider."""

    def __init__(self, connection: psycopg.Connection[Any], provider: str) -> None:
        self.connection = connection
        self.provider = provider
        self.seq = 0
        # Half a minute ago: nobody is late yet, and ten seconds have passed in which a lane with work is decided.
        self.opening = datetime.now(UTC) - timedelta(seconds=30)

    def after(self, seconds: float) -> datetime:
        return self.opening + timedelta(seconds=seconds)

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
            "created_at": self.after(-3600),
            "updated_at": self.after(-3600),
        } | columns
        self._insert("items", values)

    def purchase(self, status: str, *, quantity: int = 1, sku: str = SKU, **columns: Any) -> UUID:
        """A purchase accepted at the opening and, unless it waits, decided a second later."""
        self.seq += 1
        decided = None if status in WAITING else self.after(1)
        values: dict[str, Any] = {
            "id": uuid4(),
            "seq": self.seq,
            "client_id": "shop",
            "idempotency_key": f"key-{self.seq}",
            "item": sku,
            "lane": lane_of(sku, 16),
            "quantity": quantity,
            "customer": f"c-{self.seq}",
            "amount": 100 * quantity,
            "currency": "EUR",
            "status": status,
            "accepted_at": self.opening,
            "decided_at": decided,
        }
        if status in FINAL:
            values["finished_at"] = columns.get("decided_at", decided)
        else:
            values["payment_token"] = "tok_visa"
        if status == "reserved":
            values |= {"due_at": self.after(1), "expires_at": self.after(901)}
        if status in CHARGED:
            values |= {"attempt": 1, "fence": self.seq, "expires_at": self.after(901)}
        if status == "expired":
            values["expires_at"] = self.after(20)
        if status in ("charging", "in_doubt"):
            values["call_deadline"] = self.after(20)
        if status == "in_doubt":
            values |= {"doubt_since": self.after(20), "ask_at": self.after(20)}
        if status == "confirmed":
            values["charge_id"] = "ch_none"
        values |= columns
        self._insert("purchases", values)
        return UUID(str(values["id"]))

    def attempt(
        self, purchase: UUID, outcome: str | None, charge_id: str | None = None, number: int = 1, **columns: Any
    ) -> None:
        self._insert(
            "charge_attempts",
            {
                "purchase_id": purchase,
                "attempt": number,
                "fence": purchase.int % 2**62 + number,
                "worker": "w",
                "claimed_at": self.opening,
                "call_deadline": self.opening,
                "outcome": outcome,
                "charge_id": charge_id,
                "recorded_at": None if outcome is None else self.opening,
            }
            | columns,
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

    def drop_checks(self) -> None:
        """From here on the database takes what it would have refused."""
        for table in ("purchases", "charge_attempts"):
            rows = self.connection.execute(
                "SELECT conname FROM pg_constraint WHERE contype = 'c' AND conrelid = %s::regclass",
                (f"fairlane.{table}",),
            ).fetchall()
            for (name,) in rows:
                self.connection.execute(f"ALTER TABLE fairlane.{table} DROP CONSTRAINT {name}".encode())

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


def as_shown(report: AuditReport) -> str:
    """As a person sees it, on a screen wide enough."""
    console = Console(width=200, file=io.StringIO(), highlight=False)
    print_report(report, console)
    return cast(io.StringIO, console.file).getvalue()


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
    books.purchase(
        "needs_review", quantity=2, attempt=1, fence=99, expires_at=books.after(901), call_deadline=books.after(20)
    )
    books.purchase("needs_review", quantity=500, decided_at=None)  # set aside before it got any
    declined = books.purchase("declined")
    await books.charge(declined, "tok_declined")
    books.attempt(declined, "declined")
    books.purchase("limit_reached", quantity=3)
    books.purchase("cancelled", decided_at=None, finished_at=books.after(1))
    books.purchase("waitlisted", quantity=5)
    books.purchase("sold_out", quantity=900)
    books.purchase("queued")

    report = await audit(settings)

    assert found(report) == []
    (item,) = report.items
    assert (item.held_by_purchases, item.sold_by_purchases, item.oversold) == (7, 2, 0)
    assert report.provider.asked == 6
    assert in_doubt.hex in report.provider.open
    assert len(report.provider.open) == 3
    assert report.purchases["needs_review"] == 2
    assert report.winners_lost == ()


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
    books.item(stock=9, unpaid=3, per_customer=2, updated_at=books.after(100))
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
        overtaken = books.purchase("reserved", decided_at=books.after(12))
        books.purchase("reserved", decided_at=books.after(1))
        assert found(await audit(settings)) == [("order", overtaken.hex)]

    async def test_two_commits_that_began_in_the_same_microsecond(self, settings: Settings, books: Books) -> None:
        # Of two API processes: they look like one, but the first was committed after the lane had read the second.
        books.item(stock=2, unpaid=2)
        books.purchase("reserved", decided_at=books.after(12))
        books.purchase("reserved", decided_at=books.after(11))
        assert (await audit(settings)).ok

    async def test_waiting_while_one_who_came_minutes_later_was_served(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, unpaid=1)
        books.opening -= timedelta(seconds=140)
        overtaken = books.purchase("waitlisted")
        books.purchase("reserved", accepted_at=books.after(120), decided_at=books.after(121))
        assert found(await audit(settings)) == [("order", overtaken.hex)]

    async def test_how_long_is_certainly_later_follows_the_timeouts(self, settings: Settings, books: Books) -> None:
        patient = settings.model_copy(update={"statement_timeout": 30.0})  # a commit may take two minutes and more
        books.item(stock=1, unpaid=1)
        books.opening -= timedelta(seconds=140)
        books.purchase("waitlisted")
        books.purchase("reserved", accepted_at=books.after(120), decided_at=books.after(121))
        assert (await audit(patient)).ok

    async def test_served_after_a_fault_before_all_who_came_later(self, settings: Settings, books: Books) -> None:
        books.item(stock=3, unpaid=2)
        books.opening -= timedelta(seconds=140)
        books.purchase("reserved", decided_at=books.after(100))
        books.purchase("reserved", accepted_at=books.after(70), decided_at=books.after(100))
        assert (await audit(settings)).ok

    async def test_a_lower_number_that_may_have_been_committed_late(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, unpaid=1)
        books.purchase("queued", accepted_at=books.after(0.1))
        books.purchase("reserved", accepted_at=books.after(0.2))
        assert (await audit(settings)).ok

    async def test_set_aside_and_declined_by_an_operator_long_after(self, settings: Settings, books: Books) -> None:
        # It was "decided" when the operator declined it: nobody overtook it, and it had no stock.
        books.item(stock=1, unpaid=1)
        books.purchase("sold_out", decided_at=books.after(2), quantity=5)
        by_operator: dict[str, Any] = {"reason": DECLINED_BY_OPERATOR, "attempt": 0, "fence": None, "expires_at": None}
        books.purchase("declined", decided_at=books.after(20), quantity=5, **by_operator)
        books.purchase("reserved", decided_at=books.after(2))
        books.purchase("waitlisted")
        books.purchase("declined", decided_at=books.after(12), **by_operator)
        assert found(await audit(settings)) == []

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
        refused = books.purchase("sold_out", decided_at=books.after(1))
        books.purchase("reserved", accepted_at=books.after(0.1), decided_at=books.after(2))
        assert found(await audit(settings)) == [("refused too early", refused.hex)]

    async def test_a_restock_in_between_explains_it(self, settings: Settings, books: Books) -> None:
        books.item(stock=1, unpaid=1, updated_at=books.after(1.5))
        books.purchase("sold_out", decided_at=books.after(1))
        books.purchase("reserved", accepted_at=books.after(0.1), decided_at=books.after(2))
        assert (await audit(settings)).ok

    async def test_without_a_waitlist_returned_stock_goes_to_whoever_comes(
        self, settings: Settings, books: Books
    ) -> None:
        books.item(stock=1, unpaid=1, waitlist=False)
        books.purchase("sold_out", decided_at=books.after(1))
        books.purchase("reserved", accepted_at=books.after(0.1), decided_at=books.after(2))
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

    @pytest.mark.parametrize(
        ("status", "unpaid", "attempt"), [("declined", 0, 1), ("reserved", 1, 1), ("reserved", 1, 0), ("expired", 0, 0)]
    )
    async def test_paid_but_unconfirmed(
        self, settings: Settings, books: Books, status: str, unpaid: int, attempt: int
    ) -> None:
        # Without an attempt: Postgres came back without its last commits, the claim among them.
        books.item(stock=1, unpaid=unpaid)
        purchase = books.purchase(status, attempt=attempt, expires_at=books.after(901))
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


class TestTimes:
    """No state without the times it needs, and none with those it must not have; also where no CHECK says so."""

    #: Status, what somebody does to it, and what the audit says then. One purchase for each.
    OF_PURCHASES = (
        ("confirmed", "finished_at = NULL", "without finished_at"),
        ("sold_out", "finished_at = NULL", "without finished_at"),
        ("queued", "finished_at = now()", "with finished_at"),
        ("in_doubt", "finished_at = now()", "with finished_at"),
        ("declined", "payment_token = 'tok_kept'", "with its payment token"),
        ("reserved", "payment_token = NULL", "without its payment token"),
        ("reserved", "decided_at = NULL", "without decided_at"),
        ("confirmed", "decided_at = NULL", "without decided_at"),
        ("sold_out", "decided_at = NULL", "without decided_at"),
        ("waitlisted", "decided_at = now()", "with decided_at"),
        ("reserved", "expires_at = NULL", "without expires_at"),
        ("charging", "expires_at = NULL", "without expires_at"),
        ("expired", "expires_at = NULL", "without expires_at"),
        ("waitlisted", "expires_at = now() + interval '1 minute'", "with expires_at"),
        ("sold_out", "expires_at = now() + interval '1 minute'", "with expires_at"),
        ("reserved", "due_at = NULL", "without due_at"),
        ("charging", "due_at = now()", "with due_at"),
        ("confirmed", "due_at = now()", "with due_at"),
        ("charging", "call_deadline = NULL", "without call_deadline"),
        ("in_doubt", "call_deadline = NULL", "without call_deadline"),
        ("confirmed", "call_deadline = now()", "with call_deadline"),
        ("in_doubt", "doubt_since = NULL", "without doubt_since"),
        ("in_doubt", "ask_at = NULL", "without ask_at"),
        ("charging", "doubt_since = now()", "with doubt_since"),
        ("confirmed", "ask_at = now()", "with ask_at"),
        ("reserved", "decided_at = accepted_at - interval '2 seconds'", "decided before it was accepted"),
        (
            "sold_out",
            "finished_at = decided_at - interval '2 seconds'",
            "finished before it was accepted and decided",
        ),
        ("reserved", "expires_at = decided_at", "with a hold that ended before it began"),
        ("in_doubt", "doubt_since = decided_at - interval '2 seconds'", "in doubt before it was decided"),
    )

    async def test_of_a_purchase(self, settings: Settings, books: Books) -> None:
        held = sum(status in ("reserved", "charging", "in_doubt") for status, _, _ in self.OF_PURCHASES)
        sold = sum(status == "confirmed" for status, _, _ in self.OF_PURCHASES)
        books.item(stock=held + sold, unpaid=held, sold=sold)
        books.item("chair", stock=0)
        purchases = [
            await books.paid()
            if status == "confirmed"
            else books.purchase(status, sku="chair" if status in (*WAITING, "sold_out") else SKU)
            for status, _, _ in self.OF_PURCHASES
        ]
        assert (await audit(settings)).ok
        books.drop_checks()
        for purchase, (_, change, _) in zip(purchases, self.OF_PURCHASES, strict=True):
            books.connection.execute(f"UPDATE fairlane.purchases SET {change} WHERE id = %s".encode(), (purchase,))
        found = [(one.subject, one.detail) for one in (await audit(settings)).findings if one.check == "times"]
        assert found == [
            (purchase.hex, f"is {status} {said}")
            for purchase, (status, _, said) in zip(purchases, self.OF_PURCHASES, strict=True)
        ]

    OF_ATTEMPTS = (
        ("declined", "recorded_at = NULL", "without recorded_at"),
        (None, "recorded_at = now()", "with recorded_at"),
        ("declined", "recorded_at = claimed_at - interval '2 seconds'", "recorded before it was claimed"),
        ("not_charged", "recheck_at = NULL", "without recheck_at"),
        ("declined", "recheck_at = now()", "with recheck_at"),
    )

    async def test_of_an_attempt(self, settings: Settings, books: Books) -> None:
        books.item(stock=9, unpaid=5)
        purchases = [books.purchase("in_doubt") for _ in self.OF_ATTEMPTS]
        for purchase, (outcome, _, _) in zip(purchases, self.OF_ATTEMPTS, strict=True):
            books.attempt(purchase, outcome, recheck_at=books.after(300) if outcome == "not_charged" else None)
        assert (await audit(settings)).ok
        books.drop_checks()
        for purchase, (_, change, _) in zip(purchases, self.OF_ATTEMPTS, strict=True):
            books.connection.execute(
                f"UPDATE fairlane.charge_attempts SET {change} WHERE purchase_id = %s".encode(), (purchase,)
            )
        report = await audit(settings)
        assert found(report) == [("times", purchase.hex) for purchase in purchases]
        assert [one.detail for one in report.findings] == [
            f"attempt 1 is {outcome or 'without an outcome'} {said}" for outcome, _, said in self.OF_ATTEMPTS
        ]

    async def test_an_attempt_that_was_asked_about_three_times_is_not_asked_about_again(
        self, settings: Settings, books: Books
    ) -> None:
        books.item(stock=1)
        books.attempt(books.purchase("declined"), "not_charged", rechecks=3)
        assert (await audit(settings)).ok

    async def test_the_clock_may_be_set_back_by_a_second(self, settings: Settings, books: Books) -> None:
        books.item(stock=1)
        books.purchase("sold_out", decided_at=books.after(-0.9))
        assert (await audit(settings)).ok

    async def test_every_range_of_purchases_is_looked_at(
        self, settings: Settings, books: Books, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ops.audit._RANGE", 2)
        books.item(stock=0)
        purchases = [books.purchase("queued", seq=seq) for seq in (3, 5, 6, 1000, 1001)]
        books.drop_checks()
        books.connection.execute("UPDATE fairlane.purchases SET payment_token = NULL")
        report = await audit(settings)
        assert found(report) == [("times", purchase.hex) for purchase in purchases]


class TestStuck:
    """Who should have moved, and has not; late is not stuck."""

    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        """With which the second look comes soon."""
        quick = {"sweep_every": 0.02, "called_ttl": 0.02, "lock_timeout": 0.02, "idle_in_transaction_timeout": 0.02}
        return settings.model_copy(update=quick)

    @pytest.fixture
    def bounds(self, settings: Settings) -> Bounds:
        return Bounds.of(settings)

    @staticmethod
    def ago(seconds: float) -> datetime:
        return datetime.now(UTC) - timedelta(seconds=seconds)

    async def test_queued(self, settings: Settings, books: Books, bounds: Bounds) -> None:
        books.item(stock=1)
        stuck = books.purchase("queued", accepted_at=self.ago(bounds.round + 5))
        books.purchase("queued", accepted_at=self.ago(bounds.round - 20))
        assert found(await audit(settings)) == [("stuck", stuck.hex)]

    async def test_waitlisted(self, settings: Settings, books: Books) -> None:
        books.opening = self.ago(3600)
        later: dict[str, Any] = {"due_at": self.ago(-60), "expires_at": self.ago(-60)}
        stuck = []
        for sku, waitlist, quantity, is_stuck in (
            ("a", True, 2, True),  # can be served
            ("b", True, 3, False),  # a hold may still fall back
            ("c", True, 6, True),  # can never be served
            ("d", False, 3, True),  # nobody is to wait any more
        ):
            books.item(sku, stock=5, unpaid=3, waitlist=waitlist)
            books.purchase("reserved", sku=sku, quantity=3, **later)
            first = books.purchase("waitlisted", sku=sku, quantity=quantity)
            books.purchase("waitlisted", sku=sku, quantity=quantity)
            if is_stuck:
                stuck.append(("stuck", first.hex))
        books.item("e", stock=5)
        books.purchase("waitlisted", sku="e", accepted_at=self.ago(1))  # just so
        assert sorted(found(await audit(settings))) == sorted(stuck)

    async def test_waitlisted_while_its_item_moves(self, settings: Settings, books: Books, bounds: Bounds) -> None:
        books.opening = self.ago(3600)
        recent = self.ago(bounds.round - 20)
        books.item("hold-ended", stock=9)
        books.attempt(books.purchase("declined", sku="hold-ended", finished_at=recent), "declined")
        books.item("stock-given", stock=9, unpaid=1)
        later: dict[str, Any] = {"due_at": self.ago(-60), "expires_at": self.ago(-60)}
        books.purchase("reserved", sku="stock-given", decided_at=recent, **later)
        books.item("restocked", stock=9, updated_at=recent)
        for sku in ("hold-ended", "stock-given", "restocked"):
            books.purchase("waitlisted", sku=sku)
        assert (await audit(settings)).ok

    async def test_a_hold_that_has_ended(self, settings: Settings, books: Books, bounds: Bounds) -> None:
        books.opening = self.ago(7200)
        books.item(stock=3, unpaid=3)
        stuck = books.purchase("reserved", expires_at=self.ago(bounds.round + 5))
        books.purchase("reserved", expires_at=self.ago(bounds.round - 20))
        # Its call came to nothing only now, when its hold had ended.
        books.purchase("reserved", expires_at=self.ago(bounds.round + 60), due_at=self.ago(1))
        assert found(await audit(settings)) == [("stuck", stuck.hex)]

    async def test_a_call_without_an_outcome(self, settings: Settings, books: Books, bounds: Bounds) -> None:
        books.opening = self.ago(7200)
        books.item(stock=2, unpaid=2)
        stuck = books.purchase("charging", call_deadline=self.ago(bounds.round + 5))
        books.purchase("charging", call_deadline=self.ago(bounds.round - 20))
        assert found(await audit(settings)) == [("stuck", stuck.hex)]

    async def test_a_hold_that_is_due(self, settings: Settings, books: Books, bounds: Bounds) -> None:
        books.opening = self.ago(7200)
        books.item(stock=2, unpaid=2)
        stuck = books.purchase("reserved", due_at=self.ago(bounds.claims + 5), expires_at=self.ago(-60))
        books.purchase("reserved", due_at=self.ago(bounds.claims - 20), expires_at=self.ago(-60))
        probe = books.purchase("declined")
        books.attempt(probe, "declined", claimed_at=self.ago(bounds.claims + 5), recorded_at=self.ago(0))
        assert found(await audit(settings)) == [("stuck", stuck.hex)]
        # An open breaker lets through one at a time: others stay due, and nobody is stuck.
        books.attempt(probe, "declined", number=2, claimed_at=self.ago(bounds.claims - 20), recorded_at=self.ago(0))
        assert (await audit(settings)).ok

    async def test_a_question_that_nobody_asks(self, settings: Settings, books: Books, bounds: Bounds) -> None:
        books.opening = self.ago(1200)
        books.item(stock=2, unpaid=2)
        stuck = books.purchase("in_doubt", ask_at=self.ago(bounds.questions + 5))
        books.purchase("in_doubt", ask_at=self.ago(bounds.questions - 20))
        assert found(await audit(settings)) == [("stuck", stuck.hex)]

    async def test_a_later_question_that_nobody_asks(self, settings: Settings, books: Books, bounds: Bounds) -> None:
        books.opening = self.ago(7200)
        books.item(stock=1)
        stuck, asked = books.purchase("declined"), books.purchase("declined")
        books.attempt(stuck, "not_charged", recheck_at=self.ago(bounds.questions + 5))
        books.attempt(asked, "not_charged", recheck_at=self.ago(bounds.questions - 20))
        assert found(await audit(settings)) == [("stuck", stuck.hex)]

    async def test_in_doubt_beyond_all_patience(self, settings: Settings, books: Books, bounds: Bounds) -> None:
        books.opening = self.ago(7200)
        books.item(stock=2, unpaid=2)
        later = self.ago(-5)
        stuck = books.purchase("in_doubt", doubt_since=self.ago(bounds.doubt + 5), ask_at=later)
        books.purchase("in_doubt", doubt_since=self.ago(bounds.doubt - 20), ask_at=later)
        assert found(await audit(settings)) == [("stuck", stuck.hex)]

    @pytest.mark.parametrize("moved", [0, 1, 2])
    async def test_only_those_before_the_first_that_moved(self, settings: Settings, books: Books, moved: int) -> None:
        books.opening = self.ago(3600)
        books.item(stock=9)
        line = [books.purchase("queued") for _ in range(3)]
        looks = 0
        engine = make_async_engine(settings)

        async def read(statement: TextClause, **values: object) -> Sequence[RowMapping]:
            nonlocal looks
            if statement is LINES["queued"]:
                looks += 1
                if looks == 2:
                    books.connection.execute(
                        "UPDATE fairlane.purchases SET status = 'waitlisted', rev = rev + 1 WHERE id = %s",
                        (line[moved],),
                    )
            async with engine.connect() as connection:
                return (await connection.execute(statement, values)).mappings().all()

        try:
            stuck = await find_stuck(read, settings)
        finally:
            await engine.dispose()
        assert looks == 2
        assert [one.purchase for one in stuck] == [purchase.hex for purchase in line[:moved]]

    def test_the_bounds_follow_the_settings(self, settings: Settings) -> None:
        plain = Bounds.of(settings)
        slow = Bounds.of(settings.model_copy(update={"sweep_every": 600.0, "call_timeout": 60.0}))
        assert slow.round >= 600 + 60
        assert slow.claims > plain.claims + 600
        assert slow.questions >= slow.round + 50 * 60
        assert slow.doubt > plain.doubt


class TestWinnersLost:
    """Had stock and lost it by no doing of theirs and by no word of the provider. Named, and no drift."""

    async def test_they_are_named(self, settings: Settings, books: Books) -> None:
        books.item(stock=3)
        never_charged = books.purchase("declined", reason="not_charged")
        books.attempt(never_charged, "not_charged", recheck_at=books.after(300))
        ran_out = books.purchase("expired", reason="hold_ran_out")
        report = await audit(settings)
        assert report.winners_lost == (never_charged.hex, ran_out.hex)
        assert report.ok
        assert json.loads(as_json_text(report))["winners_lost"] == [never_charged.hex, ran_out.hex]
        shown = as_shown(report)
        assert ["winners", "lost", "to", "a", "fault", "2"] in [
            line.replace("│", " ").split() for line in shown.splitlines()
        ]
        assert never_charged.hex in shown
        assert ran_out.hex in shown

    async def test_whoever_was_refused_by_the_provider_or_went_away_is_not(
        self, settings: Settings, books: Books
    ) -> None:
        books.item(stock=3)
        refused = books.purchase("declined", reason="not_charged")  # what counts is what the attempts say
        books.attempt(refused, "not_charged", recheck_at=books.after(300))
        books.attempt(refused, "declined", number=2)
        books.purchase("cancelled", expires_at=books.after(901))
        books.purchase("expired", decided_at=None, finished_at=books.after(2), expires_at=None)  # never had stock
        books.purchase("declined", reason=DECLINED_BY_OPERATOR, attempt=0, fence=None, expires_at=None)
        report = await audit(settings)
        assert report.ok
        assert report.winners_lost == ()

    async def test_whoever_an_operator_gave_up_is(self, settings: Settings, books: Books) -> None:
        books.item(stock=1)
        given_up = books.purchase("declined", reason=DECLINED_BY_OPERATOR)
        books.attempt(given_up, "declined", reason=DECLINED_BY_OPERATOR)
        assert (await audit(settings)).winners_lost == (given_up.hex,)


async def test_many_findings_are_all_in_the_json(settings: Settings, books: Books) -> None:
    books.item(stock=0)
    purchases = [books.purchase("queued", lane=(lane_of(SKU, 16) + 1) % 16) for _ in range(60)]
    report = await audit(settings)
    named = [finding["subject"] for finding in json.loads(as_json_text(report))["findings"]]
    assert named == [purchase.hex for purchase in purchases]
    shown = as_shown(report)
    assert purchases[49].hex in shown
    assert purchases[50].hex not in shown
    assert "and 10 more" in shown


async def test_one_question_that_takes_too_long_leaves_the_audit_incomplete(
    settings: Settings, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    books.item(stock=0)
    monkeypatch.setattr("ops.audit._STATEMENT_TIMEOUT", "100ms")
    monkeypatch.setattr("ops.audit.statements.COUNTS", text("SELECT pg_sleep(10)"))
    with pytest.raises(AuditIncompleteError, match="longer than 100ms"):
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
