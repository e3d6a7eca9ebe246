"""Recording outcomes: counted under the row's fence only, together, and never given up."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from uuid import uuid4

import msgspec
import pytest
import structlog.testing

from shared import keys
from tests.integration.shopfloor import Shop
from workers.gateways import ChargeOutcome, Confirmed, Declined, InDoubt, NotSent
from workers.record import Claim, Recorded, Recorder, Result


async def claimed(shop: Shop, number: int = 1) -> list[Claim]:
    """So many purchases of one unit each, claimed, their narrow locks taken, their calls not yet made."""
    await shop.item(stock=100)
    await shop.hold(*(shop.order() for _ in range(number)))
    claims = await shop.claim()
    assert len(claims) == number
    shop.forget_calls()
    return claims


@pytest.mark.parametrize("outcome", [Confirmed("ch_1"), Declined("no_money"), NotSent("x"), InDoubt("x")])
async def test_an_outcome_under_an_older_fence_does_not_count_and_moves_no_stock(
    shop: Shop, outcome: ChargeOutcome
) -> None:
    (claim,) = await claimed(shop)
    shop.sql("UPDATE fairlane.purchases SET fence = nextval('fairlane.fence_seq'), attempt = attempt + 1")
    before = shop.purchases()
    with structlog.testing.capture_logs() as logs:
        assert await shop.recorder().record([Result.of(claim, outcome)]) == [Recorded.DID_NOT_COUNT]

    assert shop.purchases() == before
    assert shop.stock() == (99, 1, 0)
    assert shop.attempts()[0]["outcome"] is not None  # what is known is kept all the same
    level = "warning" if isinstance(outcome, NotSent) else "error"  # nothing to look at if nothing was sent
    assert [entry["event"] for entry in logs if entry["log_level"] == level] == ["outcome_did_not_count"]


@pytest.mark.parametrize("status", ["in_doubt", "needs_review"])
@pytest.mark.parametrize(
    ("outcome", "after", "stock"),
    [(Confirmed("ch_1"), "confirmed", (99, 0, 1)), (Declined("no_money"), "declined", (100, 0, 0))],
)
async def test_a_late_answer_is_still_the_answer(
    shop: Shop, status: str, outcome: ChargeOutcome, after: str, stock: tuple[int, int, int]
) -> None:
    (claim,) = await claimed(shop)
    shop.sql("UPDATE fairlane.purchases SET status = %s, doubt_since = now(), ask_at = now()", status)

    assert await shop.recorder().record([Result.of(claim, outcome)]) == [Recorded.COUNTED]
    assert (shop.statuses(), shop.stock()) == ([after], stock)


@pytest.mark.parametrize("outcome", [NotSent("x"), InDoubt("x")])
async def test_a_purchase_in_review_is_settled_by_nothing_less_than_a_final_outcome(
    shop: Shop, outcome: ChargeOutcome
) -> None:
    (claim,) = await claimed(shop)
    shop.sql("UPDATE fairlane.purchases SET status = 'needs_review'")

    assert await shop.recorder().record([Result.of(claim, outcome)]) == [Recorded.DID_NOT_COUNT]
    assert shop.statuses() == ["needs_review"]


@pytest.mark.parametrize(
    ("first", "second"),
    [(Confirmed("ch_1"), Declined("no_money")), (Declined("no_money"), Confirmed("ch_1"))],
)
async def test_a_final_purchase_never_changes_again(shop: Shop, first: ChargeOutcome, second: ChargeOutcome) -> None:
    (claim,) = await claimed(shop)
    await shop.recorder().record([Result.of(claim, first)])
    before, stock = shop.purchases(), shop.stock()

    assert await shop.recorder().record([Result.of(claim, second)]) == [Recorded.DID_NOT_COUNT]
    assert (shop.purchases(), shop.stock()) == (before, stock)


async def test_the_same_outcome_twice_moves_stock_once(shop: Shop) -> None:
    (claim,) = await claimed(shop)
    for _ in range(2):
        await shop.recorder().record([Result.of(claim, Confirmed("ch_1"))])

    assert (shop.statuses(), shop.stock()) == (["confirmed"], (99, 0, 1))


async def test_a_group_is_settled_together_each_by_its_own_outcome(shop: Shop) -> None:
    claims = await claimed(shop, 4)
    outcomes: list[ChargeOutcome] = [Confirmed("ch_1"), Declined("no_money"), NotSent("x"), InDoubt("x")]
    results = [Result.of(claim, outcome) for claim, outcome in zip(claims, outcomes, strict=True)]
    assert await shop.recorder().record(results) == [Recorded.COUNTED] * 4

    assert shop.statuses() == ["confirmed", "declined", "reserved", "in_doubt"]
    assert shop.stock() == (97, 2, 1)
    assert [attempt["outcome"] for attempt in shop.attempts()] == ["confirmed", "declined", "not_sent", "in_doubt"]
    assert shop.plain_redis.keys("fairlane:lock:*") == []


async def test_an_outcome_that_postgres_refuses_does_not_take_its_neighbours_with_it(shop: Shop) -> None:
    claims = await claimed(shop, 5)
    results = [Result.of(claim, Confirmed(f"ch_{n}")) for n, claim in enumerate(claims)]
    results[3] = msgspec.structs.replace(results[3], outcome=Confirmed("ch_\x00"))

    assert await shop.recorder().record(results) == [Recorded.COUNTED] * 3 + [Recorded.DID_NOT_COUNT] + [
        Recorded.COUNTED
    ]
    assert shop.statuses() == ["confirmed"] * 3 + ["charging"] + ["confirmed"]
    assert shop.stock() == (95, 1, 4)


async def test_the_lock_is_released_after_the_commit_and_only_ones_own(shop: Shop) -> None:
    ours, theirs = await claimed(shop, 2)
    for claim, owner in ((ours, ours.lock.owner), (theirs, "somebody else")):
        shop.plain_redis.set(claim.lock.key, owner, px=600_000)
    await shop.recorder().record([Result.of(claim, Confirmed("ch_1")) for claim in (ours, theirs)])

    assert not shop.plain_redis.exists(ours.lock.key)
    assert shop.plain_redis.get(theirs.lock.key) == "somebody else"


async def test_while_the_commit_waits_the_lock_is_held(shop: Shop) -> None:
    (claim,) = await claimed(shop)
    shop.plain_redis.set(claim.lock.key, claim.lock.owner, px=600_000)
    with shop.holding("SELECT FROM fairlane.items FOR NO KEY UPDATE"):
        recording = asyncio.create_task(shop.recorder().record([Result.of(claim, Confirmed("ch_1"))]))
        await shop.someone_waits_for_a_lock()
        assert shop.plain_redis.exists(claim.lock.key)
    await recording

    assert not shop.plain_redis.exists(claim.lock.key)


async def test_an_outcome_is_recorded_as_soon_as_postgres_is_back(shop: Shop) -> None:
    (claim,) = await claimed(shop)
    with shop.holding("SELECT FROM fairlane.items FOR NO KEY UPDATE"):
        recording = asyncio.create_task(shop.recorder().record([Result.of(claim, Confirmed("ch_1"))]))
        await shop.someone_waits_for_a_lock()
        shop.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        await shop.someone_waits_for_a_lock()  # it tries again, on another connection
        assert not recording.done()

    assert await recording == [Recorded.COUNTED]
    assert (shop.statuses(), shop.stock()) == (["confirmed"], (99, 0, 1))


async def test_without_redis_an_outcome_is_recorded_all_the_same(shop: Shop) -> None:
    (claim,) = await claimed(shop)
    recorder = Recorder(shop.engine, shop.redis_that_is_down(), shop.caller, shop.settings)

    assert await recorder.record([Result.of(claim, Confirmed("ch_1"))]) == [Recorded.COUNTED]
    assert shop.statuses() == ["confirmed"]


async def test_deciding_and_recording_the_same_item_at_once_keeps_the_books_straight(shop: Shop) -> None:
    await shop.item(stock=60)
    await shop.hold(*(shop.order() for _ in range(60)))
    claims = await shop.claim(slots=60)
    await shop.buy(*(shop.order() for _ in range(60)))
    lane = claims[0].record.lane
    outcomes = [Confirmed(f"ch_{n}") if n % 2 else Declined("no_money") for n in range(60)]
    results = [Result.of(claim, outcome) for claim, outcome in zip(claims, outcomes, strict=True)]

    def decide() -> None:
        with shop.decider(shop.with_settings(decide_batch=7)) as decider:
            for _ in range(10):
                decider.drain(lane)

    async def record_in_groups() -> None:
        for at in range(0, 60, 6):
            await shop.recorder().record(results[at : at + 6])

    await asyncio.gather(asyncio.to_thread(decide), record_in_groups())
    await asyncio.to_thread(decide)

    found = shop.statuses()
    assert found[:60] == ["declined", "confirmed"] * 30
    assert found[60:] == ["reserved"] * 30 + ["waitlisted"] * 30
    assert shop.stock() == (0, 30, 30)


async def test_the_status_written_last_is_the_newest(shop: Shop) -> None:
    (claim,) = await claimed(shop)
    await shop.recorder().record([Result.of(claim, Confirmed("ch_1"))])

    (row,) = shop.purchases()
    assert str(shop.plain_redis.get(keys.purchase(claim.record.id))).startswith(f"{row['rev']}|")


@pytest.mark.parametrize(
    ("outcome", "after"),
    [
        (Confirmed("ch_1"), "confirmed"),
        (Declined("no_money"), "declined"),
        (NotSent("x"), "reserved"),
        (InDoubt("x"), "in_doubt"),
    ],
)
async def test_the_same_outcome_again_is_success_and_is_told_again(
    shop: Shop, outcome: ChargeOutcome, after: str
) -> None:
    # The reply to the first commit was lost, and with it all that follows a commit.
    (claim,) = await claimed(shop)
    recorder = shop.recorder()
    await recorder.record([Result.of(claim, outcome)])
    before = shop.purchases()
    shop.plain_redis.flushall()

    assert await recorder.record([Result.of(claim, outcome)]) == [Recorded.COUNTED]
    assert shop.purchases() == before
    assert json.loads(str(shop.plain_redis.get(keys.purchase(claim.record.id))).split("|", 2)[2])["status"] == after


async def test_a_second_charge_is_no_success_but_an_alert(shop: Shop) -> None:
    (claim,) = await claimed(shop)
    recorder = shop.recorder()
    await recorder.record([Result.of(claim, Confirmed("ch_1"))])
    with structlog.testing.capture_logs() as logs:
        assert await recorder.record([Result.of(claim, Confirmed("ch_2"))]) == [Recorded.DID_NOT_COUNT]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["outcome_did_not_count"]


async def test_what_somebody_keeps_locked_is_for_later_with_nothing_written_and_its_lock_kept(shop: Shop) -> None:
    first, kept, last = await claimed(shop, 3)
    for claim in (first, kept, last):
        shop.plain_redis.set(claim.lock.key, claim.lock.owner, px=600_000)
    results = [Result.of(claim, Confirmed(f"ch_{n}")) for n, claim in enumerate((first, kept, last))]
    with shop.holding("SELECT FROM fairlane.purchases WHERE id = %s FOR NO KEY UPDATE", kept.record.id):
        async with asyncio.timeout(20):
            recorded = await shop.recorder().record(results)
        assert recorded == [Recorded.COUNTED, Recorded.LATER, Recorded.COUNTED]
        assert shop.statuses() == ["confirmed", "charging", "confirmed"]
        assert [attempt["outcome"] for attempt in shop.attempts()] == ["confirmed", None, "confirmed"]
        assert shop.plain_redis.keys("fairlane:lock:*") == [kept.lock.key]

    assert await shop.recorder().record([results[1]]) == [Recorded.COUNTED]
    assert shop.stock() == (97, 0, 3)
    assert shop.plain_redis.keys("fairlane:lock:*") == []


async def test_an_outcome_of_what_postgres_has_lost_is_not_for_later(shop: Shop) -> None:
    claim, forgotten = await claimed(shop, 2)
    results = [Result.of(each, Confirmed("ch_1")) for each in (claim, forgotten)]
    results[1] = msgspec.structs.replace(results[1], purchase=uuid4().hex)

    assert await shop.recorder().record(results) == [Recorded.COUNTED, Recorded.DID_NOT_COUNT]


async def test_two_outcomes_of_one_purchase_in_a_group_count_each_by_its_fence(shop: Shop) -> None:
    (claim,) = await claimed(shop)
    newer = replace(claim, fence=claim.fence + 1_000)
    shop.sql("UPDATE fairlane.purchases SET fence = fence + 1000")
    results = [
        Result.of(each, outcome) for each, outcome in ((claim, Confirmed("ch_1")), (newer, Declined("no_money")))
    ]

    assert await shop.recorder().record(results) == [Recorded.DID_NOT_COUNT, Recorded.COUNTED]
    assert (shop.statuses(), shop.stock()) == (["declined"], (100, 0, 0))


async def test_not_sent_again_is_no_alert_when_the_purchase_was_claimed_again_meanwhile(shop: Shop) -> None:
    # The reply to the first commit was lost; before the second try the purchase was due, and claimed under a new fence.
    (claim,) = await claimed(shop)
    await shop.recorder().record([Result.of(claim, NotSent("unreachable"))])
    shop.sql("UPDATE fairlane.purchases SET due_at = now()")
    (again,) = await shop.claim()
    before = shop.purchases(), shop.attempts()
    with structlog.testing.capture_logs() as logs:
        assert await shop.recorder().record([Result.of(claim, NotSent("unreachable"))]) == [Recorded.COUNTED]

    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == []
    assert (shop.purchases(), shop.attempts()) == before
    assert shop.plain_redis.get(again.lock.key) == again.lock.owner


async def test_a_charge_that_did_not_count_is_an_alert_every_time(shop: Shop) -> None:
    (claim,) = await claimed(shop)
    shop.sql("UPDATE fairlane.purchases SET fence = fence + 1000")
    for _ in range(2):
        with structlog.testing.capture_logs() as logs:
            assert await shop.recorder().record([Result.of(claim, Confirmed("ch_1"))]) == [Recorded.DID_NOT_COUNT]
        assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["outcome_did_not_count"]
