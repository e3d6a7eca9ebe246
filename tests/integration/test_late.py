"""What comes late, or twice: a claim that took long, an outcome after another one, a question while it is asked."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.integration.shopfloor import ScriptedGateway, Shop
from workers.gateways import ChargeOutcome, ChargeRecord, ChargeRequest, Confirmed, Declined, InDoubt, NotSent
from workers.record import Result


async def test_the_time_to_start_a_call_runs_from_before_its_claim(shop: Shop) -> None:
    class Told(ScriptedGateway):
        start_by = 0.0

        async def charge(self, request: ChargeRequest, *, start_by: float) -> ChargeOutcome:
            self.start_by = start_by
            return Confirmed("ch_1")

    await shop.item()
    await shop.hold(shop.order())
    settings = shop.with_settings(lock_timeout=60, statement_timeout=60, connection_timeout=90)
    gateway = Told()
    charger = shop.charger(gateway, settings=settings, engine=shop.another_engine(settings))
    with shop.holding("LOCK TABLE fairlane.charge_attempts IN SHARE MODE") as somebody:
        charging = asyncio.create_task(charger.drain())
        await shop.someone_waits_for_a_lock()  # in the middle of its claim
        during_the_claim = time.monotonic()
        somebody.rollback()
        assert (await charging).confirmed == 1
    # A process frozen in its claim has used up its time when it wakes: others count on that by the call's deadline.
    assert gateway.start_by < during_the_claim + settings.start_within


@pytest.mark.parametrize("later", [Declined("no_money"), NotSent("x"), InDoubt("x")])
async def test_what_is_known_of_an_attempt_is_not_written_over(shop: Shop, later: ChargeOutcome) -> None:
    await shop.item()
    await shop.hold(shop.order())
    (claim,) = await shop.claim()
    for outcome in (Confirmed("ch_1"), later):
        await shop.recorder().record([Result.of(claim, outcome)])
    (attempt,) = shop.attempts()
    assert (attempt["outcome"], attempt["charge_id"]) == ("confirmed", "ch_1")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Confirmed("ch_1"), Confirmed("ch_1")),
        (Confirmed("ch_1"), Declined("no_money")),
        (Declined("no_money"), Confirmed("ch_1")),
    ],
)
async def test_an_outcome_after_the_last_one_moves_no_unit_that_another_purchase_holds(
    shop: Shop, first: ChargeOutcome, second: ChargeOutcome
) -> None:
    # With no other hold the CHECK on stock would refuse what must not even be tried.
    await shop.item()
    await shop.hold(shop.order(), shop.order())
    claim, _ = await shop.claim()
    await shop.recorder().record([Result.of(claim, first)])
    before, stock = shop.purchases(), shop.stock()
    await shop.recorder().record([Result.of(claim, second)])
    assert (shop.purchases(), shop.stock()) == (before, stock)


async def test_a_question_that_is_being_asked_is_nobody_elses(shop: Shop) -> None:
    class Asked(ScriptedGateway):
        due: bool | None = None

        async def find(self, reference: str) -> list[ChargeRecord]:
            self.due = (await shop.sweep().run_once()).questions_due
            return []

    await shop.item()
    await shop.hold(shop.order())
    (claim,) = await shop.claim()
    await shop.redis.delete(claim.lock.key)
    shop.sql("UPDATE fairlane.purchases SET call_deadline = now() - interval '1 second'")
    assert (await shop.sweep().run_once()).questions_due
    gateway = Asked()
    assert (await shop.reconciler(gateway).run_once()).asked == 1
    assert gateway.due is False
