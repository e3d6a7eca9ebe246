"""The decision, checked against its rules for lines that Hypothesis makes up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.states import Reason, Status
from workers.verdicts import Stock, Verdict, Waiting, decide

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
ITEMS = ("cup", "tee")


def purchase(
    seq: int, quantity: int = 1, *, item: str = "tee", status: Status = Status.QUEUED, customer: str | None = None
) -> Waiting:
    return Waiting(f"{seq:032x}", seq, item, "shop", customer or f"c{seq}", quantity, status, NOON)


def tee(available: int, unpaid: int = 0, **terms: object) -> dict[str, Stock]:
    return {"tee": Stock("tee", available, unpaid, hold_seconds=900, **terms)}  # type: ignore[arg-type]


def outcome(verdicts: Sequence[Verdict]) -> dict[int, Status]:
    return {verdict.purchase.seq: verdict.status for verdict in verdicts}


@st.composite
def lines(draw: st.DrawFn) -> tuple[list[Waiting], dict[str, Stock], dict[tuple[str, str, str], int]]:
    """A batch over two items, in any order, with whole waitlists in it, limits and holdings."""
    purchases = [
        Waiting(
            id=f"{seq:032x}",
            seq=seq,
            item=draw(st.sampled_from(ITEMS)),
            client="shop",
            customer=draw(st.sampled_from(["ann", "bob", "cas"])),
            quantity=draw(st.integers(1, 5)),
            status=draw(st.sampled_from([Status.QUEUED, Status.QUEUED, Status.WAITLISTED])),
            accepted_at=NOON,
        )
        for seq in draw(st.lists(st.integers(1, 500), unique=True, max_size=25))
    ]
    stocks = {}
    for sku in ITEMS:
        ends = [p.seq for p in purchases if p.item == sku and p.status is Status.WAITLISTED]
        stocks[sku] = Stock(
            sku,
            available=draw(st.integers(0, 12)),
            unpaid=draw(st.integers(0, 6)),
            hold_seconds=900,
            waitlist=draw(st.booleans()),
            per_customer=draw(st.none() | st.integers(1, 8)),
            waitlist_end=max(ends, default=None),
        )
    holdings = {(sku, "shop", customer): draw(st.integers(0, 4)) for sku in ITEMS for customer in ("ann", "bob", "cas")}
    return purchases, stocks, holdings


def model(
    purchases: Sequence[Waiting], stocks: Mapping[str, Stock], holdings: Mapping[tuple[str, str, str], int]
) -> dict[int, Status]:
    """The rules again, item by item and in plain words, to compare with."""
    result = {}
    for sku, stock in stocks.items():
        available, unpaid, waits = stock.available, stock.unpaid, False
        held = defaultdict(int, {k: v for k, v in holdings.items() if k[0] == sku})
        line = [p for p in purchases if p.item == sku]
        old = sorted((p for p in line if p.status is Status.WAITLISTED), key=lambda p: p.seq)
        new = sorted((p for p in line if p.status is Status.QUEUED), key=lambda p: p.seq)
        for p in old + new:
            if stock.per_customer is not None and held[p.holder] + p.quantity > stock.per_customer:
                result[p.seq] = Status.LIMIT_REACHED
            elif not waits and p.quantity <= available:
                available, unpaid, held[p.holder] = (
                    available - p.quantity,
                    unpaid + p.quantity,
                    held[p.holder] + p.quantity,
                )
                result[p.seq] = Status.RESERVED
            elif stock.waitlist and p.quantity <= available + unpaid:
                waits = True
                result[p.seq] = Status.WAITLISTED
            else:
                result[p.seq] = Status.SOLD_OUT
    return result


@given(line=lines())
def test_it_follows_the_rules(line: tuple[list[Waiting], dict[str, Stock], dict[tuple[str, str, str], int]]) -> None:
    purchases, stocks, holdings = line
    before = {p.seq: p.status for p in purchases}
    expected = {seq: status for seq, status in model(*line).items() if status is not before[seq]}
    assert outcome(decide(purchases, stocks, holdings)) == expected


@given(line=lines())
def test_never_more_than_is_available(
    line: tuple[list[Waiting], dict[str, Stock], dict[tuple[str, str, str], int]],
) -> None:
    purchases, stocks, holdings = line
    taken: defaultdict[str, int] = defaultdict(int)
    for verdict in decide(purchases, stocks, holdings):
        if verdict.status is Status.RESERVED:
            taken[verdict.purchase.item] += verdict.purchase.quantity
    assert all(taken[sku] <= stock.available for sku, stock in stocks.items())


@given(line=lines(), order=st.randoms(use_true_random=False))
def test_the_order_in_which_rows_are_read_does_not_matter(
    line: tuple[list[Waiting], dict[str, Stock], dict[tuple[str, str, str], int]],
    order: object,
) -> None:
    purchases, stocks, holdings = line
    shuffled = list(purchases)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert outcome(decide(shuffled, stocks, holdings)) == outcome(decide(purchases, stocks, holdings))


def test_first_come_first_served() -> None:
    verdicts = decide([purchase(3), purchase(1), purchase(2)], tee(2, waitlist=False), {})
    assert outcome(verdicts) == {1: Status.RESERVED, 2: Status.RESERVED, 3: Status.SOLD_OUT}


def test_a_hold_keeps_the_time_the_item_gives_it() -> None:
    (verdict,) = decide([purchase(1)], tee(1), {})
    assert verdict.hold_seconds == 900


def test_nothing_is_left_but_a_hold_may_fall_back() -> None:
    assert outcome(decide([purchase(1)], tee(0, unpaid=1), {})) == {1: Status.WAITLISTED}


def test_more_than_could_ever_fall_back_is_sold_out() -> None:
    assert outcome(decide([purchase(1, 2)], tee(0, unpaid=1), {})) == {1: Status.SOLD_OUT}


def test_without_a_waitlist_it_is_sold_out_at_once() -> None:
    assert outcome(decide([purchase(1)], tee(0, unpaid=1, waitlist=False), {})) == {1: Status.SOLD_OUT}


def test_a_smaller_request_does_not_pass_a_bigger_one() -> None:
    verdicts = decide([purchase(1, 2), purchase(2, 1)], tee(1, unpaid=5), {})
    assert outcome(verdicts) == {1: Status.WAITLISTED, 2: Status.WAITLISTED}


def test_the_waitlisted_stand_before_newcomers_whatever_their_seq() -> None:
    # A purchase that was committed late may have a lower seq than one that is on the list already.
    batch = [purchase(1), purchase(2, status=Status.WAITLISTED)]
    assert outcome(decide(batch, tee(1, unpaid=1, waitlist_end=2), {})) == {2: Status.RESERVED, 1: Status.WAITLISTED}


def test_a_newcomer_does_not_pass_a_waitlist_outside_the_batch() -> None:
    assert outcome(decide([purchase(9)], tee(1, unpaid=1, waitlist_end=5), {})) == {9: Status.WAITLISTED}


def test_who_goes_on_waiting_gets_no_verdict() -> None:
    batch = [purchase(1, 3, status=Status.WAITLISTED)]
    assert decide(batch, tee(1, unpaid=2, waitlist_end=1), {}) == []


def test_the_waitlist_ends_when_the_last_hold_is_paid() -> None:
    batch = [purchase(1, status=Status.WAITLISTED), purchase(2, status=Status.WAITLISTED)]
    verdicts = decide(batch, tee(0, unpaid=0, waitlist_end=2), {})
    assert outcome(verdicts) == {1: Status.SOLD_OUT, 2: Status.SOLD_OUT}


def test_a_customer_gets_no_more_than_the_limit() -> None:
    batch = [purchase(1, 2, customer="ann"), purchase(2, 1, customer="ann"), purchase(3, 1, customer="bob")]
    verdicts = decide(batch, tee(9, per_customer=3), {("tee", "shop", "ann"): 1})
    assert outcome(verdicts) == {1: Status.RESERVED, 2: Status.LIMIT_REACHED, 3: Status.RESERVED}


@pytest.mark.parametrize(
    ("opens", "closes", "status"),
    [
        (NOON, None, Status.RESERVED),
        (NOON + timedelta(microseconds=1), None, Status.CANCELLED),
        (None, NOON, Status.CANCELLED),
        (None, NOON + timedelta(microseconds=1), Status.RESERVED),
    ],
)
def test_opening_hours_are_judged_by_when_it_was_accepted(
    opens: datetime | None, closes: datetime | None, status: Status
) -> None:
    (verdict,) = decide([purchase(1)], tee(1, opens_at=opens, closes_at=closes), {})
    assert verdict.status is status
    assert verdict.reason is (Reason.NOT_ON_SALE if status is Status.CANCELLED else None)


def test_a_row_that_cannot_be_decided_does_not_stop_the_others() -> None:
    verdicts = decide([purchase(1, item="gone"), purchase(2)], tee(1), {})
    assert outcome(verdicts) == {1: Status.NEEDS_REVIEW, 2: Status.RESERVED}
    assert isinstance(verdicts[0].error, KeyError)


def test_a_newcomer_waits_while_a_waitlist_that_was_turned_off_is_longer_than_the_batch() -> None:
    batch = [purchase(1, status=Status.WAITLISTED), purchase(9), purchase(10, 3)]
    verdicts = decide(batch, tee(3, waitlist=False, waitlist_end=5), {})
    assert outcome(verdicts) == {1: Status.RESERVED, 10: Status.SOLD_OUT}
