"""Recovery on the real servers: what ran out of time is found, asked about, and ends as it should."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import structlog.testing

from shared import keys
from shared.narrow_lock import Lock, NarrowLock
from tests.integration.shopfloor import ScriptedGateway, Shop
from workers.gateways import ChargeRecord, Confirmed, InDoubt, NotSent
from workers.reconcile import Reconciler
from workers.record import Claim, Recorded, Recorder, Result

OVERDUE = "UPDATE fairlane.purchases SET call_deadline = now() - interval '1 second'"
SETTLED = "UPDATE fairlane.purchases SET call_deadline = now() - interval '61 seconds', ask_at = now()"


async def claimed(shop: Shop) -> Claim:
    """One purchase of one unit of ten, claimed, its worker dead: the lock is gone."""
    await shop.item()
    await shop.hold(shop.order())
    (claim,) = await shop.claim()
    await shop.redis.delete(claim.lock.key)
    shop.forget_calls()
    return claim


async def in_doubt(shop: Shop) -> Claim:
    claim = await claimed(shop)
    shop.sql(OVERDUE)
    assert len((await shop.sweep().run_once()).in_doubt) == 1
    shop.forget_calls()
    return claim


def found(claim: Claim, *statuses: str) -> ScriptedGateway:
    gateway = ScriptedGateway()
    gateway.records = {claim.record.id: [ChargeRecord(f"ch_{n}", status) for n, status in enumerate(statuses)]}
    return gateway


async def test_a_claim_past_its_deadline_is_in_doubt_and_asked_about(shop: Shop) -> None:
    overdue = await claimed(shop)
    sweep = shop.sweep()
    assert (await sweep.run_once()).in_doubt == ()
    shop.sql(OVERDUE)
    (under_way,) = await shop.hold(shop.order())
    await shop.claim()
    shop.forget_calls()
    swept = await sweep.run_once()
    assert [record.id for record in swept.in_doubt] == [overdue.record.id]
    assert (shop.status(under_way), shop.stock()) == ("charging", (8, 2, 0))
    assert swept.questions_due
    assert [message["headers"]["task"] for message in shop.messages("charges")] == ["purchases.reconcile"]


async def test_a_lock_that_still_stands_does_not_keep_a_claim_from_being_in_doubt(shop: Shop) -> None:
    claim = await claimed(shop)
    await NarrowLock(shop.redis, 30).acquire([claim.lock])
    shop.sql(OVERDUE)
    assert len((await shop.sweep().run_once()).in_doubt) == 1


@pytest.mark.parametrize(
    ("statuses", "after", "stock"),
    [
        (("succeeded",), "confirmed", (9, 0, 1)),
        (("declined",), "declined", (10, 0, 0)),
        (("succeeded", "succeeded"), "needs_review", (9, 1, 0)),
    ],
)
async def test_what_the_provider_knows_settles_it_at_once(
    shop: Shop, statuses: tuple[str, ...], after: str, stock: tuple[int, int, int]
) -> None:
    claim = await in_doubt(shop)
    assert (await shop.reconciler(found(claim, *statuses)).run_once()).settled == 1
    assert (shop.statuses(), shop.stock()) == ([after], stock)
    assert await shop.redis.exists(claim.lock.key) == 0


async def test_not_found_before_the_settle_window_ends_means_nothing(shop: Shop) -> None:
    claim = await in_doubt(shop)
    reconciled = await shop.reconciler(found(claim)).run_once()
    assert (reconciled.settled, reconciled.postponed) == (0, 1)
    assert shop.statuses() == ["in_doubt"]
    assert await shop.redis.exists(claim.lock.key) == 0


async def test_never_charged_gets_one_more_attempt_and_is_then_declined(shop: Shop) -> None:
    claim = await in_doubt(shop)
    reconciler = shop.reconciler(found(claim), shop.with_settings(never_charged_limit=2))
    shop.sql(SETTLED)
    await reconciler.run_once()
    assert (shop.statuses(), shop.stock()) == (["reserved"], (9, 1, 0))

    (again,) = await shop.claim()
    assert again.fence != claim.fence
    await shop.redis.delete(again.lock.key)
    shop.sql(SETTLED.replace("SET ", "SET status = 'in_doubt', doubt_since = now(), "))
    await reconciler.run_once()
    assert (shop.statuses(), shop.stock()) == (["declined"], (10, 0, 0))
    assert shop.purchases()[0]["reason"] == "not_charged"
    assert [attempt["outcome"] for attempt in shop.attempts()] == ["not_charged", "not_charged"]


async def test_a_hold_that_would_have_ended_in_doubt_still_gets_its_attempt(shop: Shop) -> None:
    claim = await in_doubt(shop)
    shop.sql("UPDATE fairlane.purchases SET expires_at = now()")
    shop.sql(SETTLED)
    await shop.reconciler(found(claim)).run_once()
    assert (await shop.sweep().run_once()).expired == ()
    assert len(await shop.claim()) == 1


async def test_a_silent_provider_is_asked_again_and_then_it_is_for_an_operator(shop: Shop) -> None:
    await in_doubt(shop)
    reconciler = shop.reconciler(ScriptedGateway())
    assert (await reconciler.run_once()).postponed == 1
    assert (await reconciler.run_once()).asked == 0, "not before its time"
    shop.sql("UPDATE fairlane.purchases SET ask_at = now(), doubt_since = now() - interval '1 hour'")
    await reconciler.run_once()
    assert (shop.statuses(), shop.purchases()[0]["reason"]) == (["needs_review"], "provider_silent")


async def test_nothing_is_asked_while_somebody_has_the_narrow_lock(shop: Shop) -> None:
    claim = await in_doubt(shop)
    await NarrowLock(shop.redis, 30).acquire([Lock(keys.charge_lock(claim.record.id), "worker-2:7")])
    assert (await shop.reconciler(found(claim, "succeeded")).run_once()).asked == 0
    assert shop.statuses() == ["in_doubt"]


async def test_two_reconcilers_do_not_ask_about_the_same_purchase(shop: Shop) -> None:
    claim = await in_doubt(shop)
    gateway = found(claim, "succeeded")
    rounds = await asyncio.gather(*(shop.reconciler(gateway).run_once() for _ in range(4)))
    assert sum(reconciled.asked for reconciled in rounds) == 1


@pytest.mark.parametrize(("outcome", "after"), [(Confirmed("ch_late"), "confirmed"), (NotSent("too_late"), "reserved")])
async def test_a_late_outcome_under_the_same_fence_settles_the_doubt(
    shop: Shop, outcome: Confirmed | NotSent, after: str
) -> None:
    claim = await in_doubt(shop)
    assert await shop.recorder().record([Result.of(claim, outcome)]) == [Recorded.COUNTED]
    assert shop.statuses() == [after]


async def test_a_call_without_an_answer_is_asked_about_at_once(shop: Shop) -> None:
    claim = await claimed(shop)
    await shop.recorder().record([Result.of(claim, InDoubt("timeout"))])
    assert (await shop.reconciler(found(claim, "succeeded")).run_once()).settled == 1
    assert shop.statuses() == ["confirmed"]


async def test_a_charge_found_after_never_charged_is_an_alert(shop: Shop) -> None:
    claim = await in_doubt(shop)
    shop.sql(SETTLED)
    gateway = found(claim)
    reconciler = shop.reconciler(gateway, shop.with_settings(not_charged="decline"))
    await reconciler.run_once()
    assert shop.statuses() == ["declined"]
    assert (await reconciler.run_once()).rechecked == 0, "five minutes later, not at once"

    gateway.records = {claim.record.id: [ChargeRecord("ch_late", "succeeded")]}
    shop.sql("UPDATE fairlane.charge_attempts SET recheck_at = now()")
    with structlog.testing.capture_logs() as logs:
        assert (await reconciler.run_once()).found_late == 1
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["charge_found_late"]


async def test_an_attempt_is_rechecked_three_times_and_no_more(shop: Shop) -> None:
    claim = await in_doubt(shop)
    shop.sql(SETTLED)
    reconciler = shop.reconciler(found(claim), shop.with_settings(not_charged="decline"))
    await reconciler.run_once()
    rechecked = []
    for _ in range(5):
        shop.sql("UPDATE fairlane.charge_attempts SET recheck_at = now() WHERE recheck_at IS NOT NULL")
        rechecked.append((await reconciler.run_once()).rechecked)
    assert rechecked == [1, 1, 1, 0, 0]


async def test_a_hold_that_ran_out_gives_its_unit_to_the_first_who_waits(shop: Shop) -> None:
    await shop.item(stock=1)
    (held,) = await shop.hold(shop.order())
    (waiting,) = await shop.buy(shop.order())
    with shop.decider() as decider:
        decider.drain(waiting.lane)
        assert shop.status(waiting) == "waitlisted"
        shop.sql("UPDATE fairlane.purchases SET expires_at = now() WHERE status = 'reserved'")
        shop.forget_calls()
        swept = await shop.sweep().run_once()
        assert [record.id for record in swept.expired] == [held.id]
        assert (shop.status(held), shop.stock()) == ("expired", (1, 0, 0))
        assert shop.purchase(held)["payment_token"] is None
        assert swept.lanes == (waiting.lane,)
        decider.drain(waiting.lane)
    assert (shop.status(waiting), shop.stock()) == ("reserved", (0, 1, 0))


async def test_what_may_have_been_sent_never_expires(shop: Shop) -> None:
    claim = await claimed(shop)
    (unsent,) = await shop.hold(shop.order())
    shop.sql("UPDATE fairlane.purchases SET expires_at = now() - interval '1 day'")
    assert [record.id for record in (await shop.sweep().run_once()).expired] == [unsent.id]
    assert shop.status(claim.record) == "charging"


async def test_an_item_that_somebody_keeps_does_not_stop_the_rest_of_the_sweep(shop: Shop) -> None:
    await claimed(shop)
    await shop.item("kept")
    await shop.hold(shop.order("kept"))
    shop.sql("UPDATE fairlane.purchases SET expires_at = now() WHERE item = 'kept'")
    shop.sql(OVERDUE + " WHERE status = 'charging'")
    with shop.holding("SELECT 1 FROM fairlane.items WHERE sku = 'kept' FOR NO KEY UPDATE"):
        swept = await shop.sweep().run_once()
    assert (len(swept.in_doubt), swept.expired) == (1, ())
    assert len((await shop.sweep().run_once()).expired) == 1


async def test_two_claims_never_share_a_lock_even_under_the_same_fence(shop: Shop) -> None:
    # A Postgres that was restored to before a claim gives its fence out again, while the call may still be under way.
    claim = await claimed(shop)
    again = replace(claim, nonce="another")
    locks = NarrowLock(shop.redis, 30)
    assert await locks.acquire([claim.lock]) == [True]
    assert await locks.acquire([again.lock]) == [False]


#: Postponed, and not left until its lease is over (CALL_TIMEOUT + CALL_MARGIN, 15 s).
SOON = "SELECT ask_at > now() AND ask_at < now() + interval '6 seconds' AS soon FROM fairlane.purchases"


async def test_a_question_that_found_the_lock_taken_is_asked_again_within_seconds(shop: Shop) -> None:
    claim = await in_doubt(shop)
    shop.sql("UPDATE fairlane.purchases SET doubt_since = now() - interval '10 minutes'")
    await NarrowLock(shop.redis, 30).acquire([Lock(claim.lock.key, "worker-2:7")])
    reconciled = await shop.reconciler(found(claim, "succeeded")).run_once()

    assert (reconciled.asked, reconciled.postponed) == (0, 1)
    assert shop.sql(SOON) == [{"soon": True}]
    assert shop.plain_redis.get(claim.lock.key) == "worker-2:7"


async def test_a_question_without_redis_is_asked_again_within_seconds(shop: Shop) -> None:
    claim = await in_doubt(shop)
    recorder = Recorder(shop.engine, shop.redis_that_is_down(), shop.caller, shop.settings)
    reconciler = Reconciler(
        shop.engine, shop.redis_that_is_down(), found(claim, "succeeded"), recorder, shop.settings, "worker-1"
    )

    assert (await reconciler.run_once()).asked == 0
    assert shop.sql(SOON) == [{"soon": True}]


async def test_an_answer_about_a_purchase_that_somebody_keeps_locked_waits_alone(shop: Shop) -> None:
    await shop.item()
    await shop.hold(shop.order(), shop.order())
    kept, other = await shop.claim()
    for claim in (kept, other):
        await shop.recorder().record([Result.of(claim, InDoubt("timeout"))])
    gateway = found(kept, "succeeded")
    gateway.records = {claim.record.id: [ChargeRecord(f"ch_{claim.fence}", "succeeded")] for claim in (kept, other)}

    async def lock_one_of_them(reference: str) -> list[ChargeRecord]:
        somebody.execute(b"SELECT FROM fairlane.purchases WHERE id = %s FOR UPDATE", [kept.record.id])
        return await ScriptedGateway.find(gateway, reference)

    gateway.find = lock_one_of_them  # type: ignore[method-assign]
    with shop.holding("SELECT 1") as somebody:
        async with asyncio.timeout(20):
            assert (await shop.reconciler(gateway).run_once()).settled == 1
        assert (shop.status(kept.record), shop.status(other.record)) == ("in_doubt", "confirmed")
        assert shop.plain_redis.keys("fairlane:lock:*") == []
    shop.sql("UPDATE fairlane.purchases SET ask_at = now() WHERE status = 'in_doubt'")
    assert (await shop.reconciler(found(kept, "succeeded")).run_once()).settled == 1
    assert shop.statuses() == ["confirmed", "confirmed"]
