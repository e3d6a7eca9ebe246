"""Charging on real servers: the intent, the slots, the narrow lock, and what each outcome leads to.

Only the payment provider is scripted, as a gateway may be; the last test has a real one.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import structlog.testing

from ops.sandbox import ProviderProcess
from shared import keys, lock_metrics
from shared.purchases import PurchaseRecord
from tests.integration.shopfloor import ScriptedGateway, Shop, until
from workers.charge import Charged, Charger
from workers.gateways import (
    Capabilities,
    ChargeOutcome,
    ChargeRequest,
    Confirmed,
    Declined,
    HttpGateway,
    InDoubt,
    NotSent,
)


def counts(charged: Charged) -> dict[str, Any]:
    """What was counted, without zeros and without the time."""
    return {name: value for name, value in charged.as_result().items() if value and name != "seconds"}


async def held(shop: Shop, number: int = 1, **terms: Any) -> list[PurchaseRecord]:
    """So many purchases with a hold, due to be charged, and Redis as if just started."""
    await shop.item(stock=1_000, **terms)
    records = await shop.hold(*(shop.order() for _ in range(number)))
    assert set(shop.statuses()) == {"reserved"}
    shop.forget_calls()
    return records


async def test_the_intent_is_committed_before_the_call(shop: Shop) -> None:
    await held(shop)
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []

    async def look(request: ChargeRequest) -> ChargeOutcome:
        (attempt,) = shop.attempts()
        seen.append((shop.purchases()[0], attempt))
        return Confirmed("ch_1")

    await shop.charger(ScriptedGateway(look), worker="worker-7").drain()

    ((purchase, attempt),) = seen
    assert (purchase["status"], purchase["attempt"], purchase["due_at"]) == ("charging", 1, None)
    assert (attempt["fence"], attempt["worker"], attempt["outcome"]) == (purchase["fence"], "worker-7", None)
    assert purchase["call_deadline"] == attempt["call_deadline"]
    seconds = (purchase["call_deadline"] - attempt["claimed_at"]).total_seconds()
    assert seconds == pytest.approx(shop.settings.overdue_after, abs=1)


async def test_a_call_says_what_is_charged_under_the_narrow_lock(shop: Shop) -> None:
    await shop.item(price=250, currency="CHF")
    (bought,) = await shop.hold(shop.order(quantity=2, customer="c-42", payment_token="tok_visa"))
    owners: list[Any] = []

    async def look(request: ChargeRequest) -> ChargeOutcome:
        owners.append(shop.plain_redis.get(keys.charge_lock(request.reference)))
        return Confirmed("ch_1")

    gateway = ScriptedGateway(look)
    await shop.charger(gateway, worker="worker-7").drain()

    assert gateway.requests == [ChargeRequest(bought.id, 500, "CHF", "c-42", "tok_visa")]
    (owner,) = owners
    assert owner.startswith(f"worker-7:{shop.purchase(bought)['fence']}:")
    assert not shop.plain_redis.exists(keys.charge_lock(bought.id))  # released after the outcome


@pytest.mark.parametrize(
    ("outcome", "purchase", "attempt", "stock"),
    [
        (
            Confirmed("ch_9"),
            {"status": "confirmed", "reason": None, "charge_id": "ch_9", "payment_token": None},
            {"outcome": "confirmed", "reason": None, "charge_id": "ch_9"},
            (999, 0, 1),
        ),
        (
            Declined("no_money", "ch_9"),
            {"status": "declined", "reason": "no_money", "charge_id": "ch_9", "payment_token": None},
            {"outcome": "declined", "reason": "no_money", "charge_id": "ch_9"},
            (1_000, 0, 0),
        ),
        (
            NotSent("unreachable", retry_after=60.0),
            {"status": "reserved", "reason": "unreachable", "charge_id": None, "payment_token": "tok_secret"},
            {"outcome": "not_sent", "reason": "unreachable", "charge_id": None},
            (999, 1, 0),
        ),
        (
            InDoubt("timeout"),
            {"status": "in_doubt", "reason": "timeout", "charge_id": None, "payment_token": "tok_secret"},
            {"outcome": "in_doubt", "reason": "timeout", "charge_id": None},
            (999, 1, 0),
        ),
    ],
    ids=["confirmed", "declined", "not-sent", "in-doubt"],
)
async def test_an_outcome_settles_the_purchase_the_attempt_and_the_stock(
    shop: Shop,
    outcome: ChargeOutcome,
    purchase: dict[str, Any],
    attempt: dict[str, Any],
    stock: tuple[int, int, int],
) -> None:
    (bought,) = await held(shop)
    before = shop.purchase(bought)
    charged = await shop.charger(ScriptedGateway(outcome)).drain()

    row = shop.purchase(bought)
    assert {name: row[name] for name in purchase} == purchase
    (tried,) = shop.attempts()
    assert {name: tried[name] for name in attempt} == attempt
    assert tried["recorded_at"] is not None
    assert shop.stock() == stock
    assert counts(charged) == {"claimed": 1, attempt["outcome"]: 1}
    assert row["rev"] == before["rev"] + 2
    final = purchase["status"] in {"confirmed", "declined"}
    assert (row["finished_at"] is not None) == final
    assert (row["call_deadline"] is not None) == (purchase["status"] == "in_doubt")
    status = str(shop.plain_redis.get(keys.purchase(bought.id)))
    assert status.startswith(f"{row['rev']}|")
    assert f'"status":"{purchase["status"]}"' in status
    assert not shop.plain_redis.exists(keys.charge_lock(bought.id))


async def test_a_declined_charge_opens_the_door_again(shop: Shop) -> None:
    await shop.item(stock=1, waitlist=False)
    await shop.hold(shop.order())
    assert shop.plain_redis.hget(keys.item("sku-1"), "within_reach") == "0"
    await shop.charger(ScriptedGateway(Declined("no_money"))).drain()

    assert shop.plain_redis.hget(keys.item("sku-1"), "within_reach") == "1"


async def test_what_was_not_sent_is_due_again_later_and_keeps_its_hold(shop: Shop) -> None:
    (bought,) = await held(shop)
    before = shop.purchase(bought)
    gateway = ScriptedGateway(NotSent("http_429", retry_after=300.0))
    await shop.charger(gateway).drain()

    row = shop.purchase(bought)
    assert (row["due_at"] - datetime.now(UTC)).total_seconds() > 200
    assert row["expires_at"] == before["expires_at"]
    assert counts(await shop.charger(gateway).drain()) == {}  # not due yet
    shop.sql("UPDATE fairlane.purchases SET due_at = now()")
    await shop.charger(ScriptedGateway()).drain()
    row = shop.purchase(bought)
    assert (row["status"], row["attempt"]) == ("confirmed", 2)
    assert [attempt["outcome"] for attempt in shop.attempts()] == ["not_sent", "confirmed"]


async def test_two_chargers_call_for_every_purchase_once(shop: Shop) -> None:
    records = await held(shop, 60)
    gateway = ScriptedGateway()
    settings = shop.with_settings(charge_slots=5)
    chargers = [
        shop.charger(gateway, settings=settings, engine=shop.another_engine(), worker=f"worker-{n}") for n in range(2)
    ]
    charged = await asyncio.gather(*(charger.drain() for charger in chargers))

    assert sorted(gateway.references) == sorted(record.id for record in records)
    assert sum(each.claimed for each in charged) == sum(each.confirmed for each in charged) == 60
    assert shop.stock() == (940, 0, 60)
    assert len({attempt["fence"] for attempt in shop.attempts()}) == 60


async def test_a_claim_goes_past_what_somebody_else_has_locked(shop: Shop) -> None:
    first, second = await held(shop, 2)
    gateway = ScriptedGateway()
    with shop.holding("SELECT FROM fairlane.purchases WHERE id = %s FOR UPDATE", first.id):
        async with asyncio.timeout(20):
            await shop.charger(gateway).drain()

    assert gateway.references == [second.id]
    assert shop.status(first) == "reserved"


async def test_never_more_calls_are_claimed_than_there_are_slots(shop: Shop) -> None:
    await held(shop, 20)
    claimed: list[int] = []
    all_slots_taken = asyncio.Event()

    async def look(request: ChargeRequest) -> ChargeOutcome:
        if gateway.under_way == 4:
            all_slots_taken.set()
        await all_slots_taken.wait()
        claimed.append(shop.statuses().count("charging"))
        return Confirmed(f"ch_{request.reference}")

    gateway = ScriptedGateway(look)
    charger = shop.charger(gateway, settings=shop.with_settings(charge_slots=4))
    async with asyncio.timeout(30):
        charged = await asyncio.gather(charger.drain(), charger.drain())  # two claim checks share the slots

    assert sum(each.confirmed for each in charged) == 20
    assert gateway.most_under_way == 4
    assert max(claimed) == 4


async def test_a_hold_that_ran_out_is_not_claimed(shop: Shop) -> None:
    (bought,) = await held(shop)
    shop.sql("UPDATE fairlane.purchases SET expires_at = now()")
    gateway = ScriptedGateway()

    assert counts(await shop.charger(gateway).drain()) == {}
    assert gateway.requests == []
    assert shop.status(bought) == "reserved"


async def test_charges_are_claimed_in_the_order_in_which_they_are_due(shop: Shop) -> None:
    first, second, third = await held(shop, 3)
    shop.sql("UPDATE fairlane.purchases SET due_at = now() - interval '1 h' WHERE id = %s", third.id)
    gateway = ScriptedGateway()
    await shop.charger(gateway, settings=shop.with_settings(charge_slots=1)).drain()

    assert gateway.references == [third.id, first.id, second.id]


async def test_a_lock_that_somebody_else_has_means_not_sent(shop: Shop) -> None:
    locked, free = await held(shop, 2)
    shop.plain_redis.set(keys.charge_lock(locked.id), "somebody else", px=600_000)
    gateway = ScriptedGateway()
    charged = await shop.charger(gateway, settings=shop.with_settings(charge_retry=600)).drain()

    assert gateway.references == [free.id]
    assert counts(charged) == {"claimed": 2, "confirmed": 1, "not_sent": 1}
    row = shop.purchase(locked)
    assert (row["status"], row["reason"]) == ("reserved", "lock_not_obtained")
    assert (row["due_at"] - datetime.now(UTC)).total_seconds() > 100
    assert shop.plain_redis.get(keys.charge_lock(locked.id)) == "somebody else"
    assert shop.stock() == (998, 1, 1)


async def test_without_redis_nothing_is_sent(shop: Shop) -> None:
    await held(shop, 3)
    gateway = ScriptedGateway()
    charger = shop.charger(
        gateway, client=shop.redis_that_is_down(), settings=shop.with_settings(charge_retry=600, charge_slots=2)
    )
    charged = await charger.drain()

    assert gateway.requests == []
    assert counts(charged) == {"claimed": 2, "not_sent": 2}  # and then the claims pause
    assert shop.statuses() == ["reserved"] * 3
    assert shop.stock() == (997, 3, 0)


async def test_a_lock_flushed_during_the_call_changes_nothing_of_its_outcome(shop: Shop) -> None:
    (bought,) = await held(shop)

    async def flush(request: ChargeRequest) -> ChargeOutcome:
        shop.plain_redis.flushall()
        return Confirmed("ch_1")

    await shop.charger(ScriptedGateway(flush)).drain()

    assert shop.status(bought) == "confirmed"


async def test_the_mark_of_the_charges_is_deleted_before_the_claim_reads(shop: Shop) -> None:
    await held(shop)
    shop.plain_redis.set(keys.called("charges"), "who called us", px=600_000)
    looked: list[bool] = []

    async def look(request: ChargeRequest) -> ChargeOutcome:
        looked.append(shop.called("charges"))
        shop.plain_redis.set(keys.called("charges"), "who calls now", px=600_000)
        return Confirmed("ch_1")

    gateway = ScriptedGateway(look)
    charger = shop.charger(gateway, settings=shop.with_settings(charge_slots=1))
    await charger.drain(stopping=lambda: bool(gateway.requests))

    assert looked == [False]
    assert shop.called("charges")


@pytest.fixture
def stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, the first second is not over."""
    monkeypatch.setattr("workers.charge._STAY", 600.0)


@pytest.mark.usefixtures("stays")
async def test_a_charger_that_had_all_that_was_due_looks_again_and_nobody_need_call_it(shop: Shop) -> None:
    """What becomes due meanwhile is charged by the same drain, while the mark keeps others from calling."""
    await held(shop)
    called: list[bool] = []

    async def more(request: ChargeRequest) -> ChargeOutcome:
        called.append(shop.called("charges"))
        if len(called) == 1:
            await shop.hold(shop.order())
        return Confirmed(f"ch_{request.reference}")

    charged = await shop.charger(ScriptedGateway(more)).drain()

    assert counts(charged) == {"claimed": 2, "confirmed": 2}
    assert called == [True, True]
    # It went without work, so the next is called again.
    assert not shop.called("charges")


@pytest.mark.usefixtures("stays")
async def test_a_charger_that_is_told_to_stop_while_it_stays_calls_another(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What became due meanwhile called nobody, as the mark said that it would look again."""
    monkeypatch.setattr("workers.charge._CLAIMS_EVERY", 1.0)  # longer than what happens here in between
    await held(shop)
    stopping = asyncio.Event()

    async def stop(request: ChargeRequest) -> ChargeOutcome:
        assert shop.called("charges")
        await shop.hold(shop.order())
        assert shop.messages("charges") == []
        stopping.set()
        return Confirmed("ch_1")

    await shop.charger(ScriptedGateway(stop)).drain(stopping.is_set)

    assert shop.statuses() == ["confirmed", "reserved"]
    assert len(shop.messages("charges")) == 1


@pytest.mark.usefixtures("stays")
async def test_a_charger_that_stays_while_the_provider_fails_leaves_no_mark(shop: Shop) -> None:
    await held(shop, 12)
    marked: list[bool] = []

    async def fail(request: ChargeRequest) -> ChargeOutcome:
        marked.append(shop.called("charges"))
        return InDoubt("timeout")

    await shop.charger(ScriptedGateway(fail)).drain()

    assert set(shop.statuses()) == {"in_doubt"}
    assert all(marked)
    assert not shop.called("charges")


@pytest.mark.usefixtures("stays")
async def test_a_charger_whose_slots_are_all_used_lets_others_be_called(shop: Shop) -> None:
    await held(shop, 2)
    called: list[bool] = []

    async def look(request: ChargeRequest) -> ChargeOutcome:
        called.append(shop.called("charges"))
        return Confirmed(f"ch_{request.reference}")

    await shop.charger(ScriptedGateway(look), settings=shop.with_settings(charge_slots=1)).drain()

    assert called == [False, False]


async def test_a_charger_that_is_to_stop_claims_nothing_more_and_records_what_it_called(shop: Shop) -> None:
    await held(shop, 3)
    stopping = asyncio.Event()

    async def stop(request: ChargeRequest) -> ChargeOutcome:
        stopping.set()
        return Confirmed(f"ch_{request.reference}")

    charged = await shop.charger(ScriptedGateway(stop), settings=shop.with_settings(charge_slots=1)).drain(
        stopping.is_set
    )

    assert counts(charged) == {"claimed": 1, "confirmed": 1}
    assert shop.statuses() == ["confirmed", "reserved", "reserved"]


async def test_slots_are_free_again_after_a_claim_that_failed(shop: Shop) -> None:
    await held(shop, 2)
    charger = shop.charger(ScriptedGateway(), settings=shop.with_settings(charge_slots=1))
    shop.sql("ALTER TABLE fairlane.charge_attempts RENAME TO elsewhere")
    with pytest.raises(Exception, match="charge_attempts"):
        await charger.drain()
    shop.sql("ALTER TABLE fairlane.elsewhere RENAME TO charge_attempts")

    async with asyncio.timeout(20):
        assert counts(await charger.drain()) == {"claimed": 2, "confirmed": 2}


async def test_a_real_gateway_charges_a_real_provider_once_each(shop: Shop, tmp_path: Path) -> None:
    records = await held(shop, 12)
    with ProviderProcess(tmp_path / "provider", latency=0.01) as provider:
        gateway = HttpGateway(provider.url, call_timeout=10, connections=4)
        try:
            charger: Charger = shop.charger(gateway, settings=shop.with_settings(charge_slots=4))
            charged = await charger.drain()
            found = {record.id: await gateway.find(record.id) for record in records}
        finally:
            await gateway.close()

    assert counts(charged) == {"claimed": 12, "confirmed": 12}
    assert {row["id"].hex: [row["charge_id"]] for row in shop.purchases()} == {
        reference: [charge.id for charge in charges] for reference, charges in found.items()
    }
    await until(lambda: not shop.plain_redis.keys("fairlane:lock:*"))


async def test_a_probe_whose_lock_somebody_has_does_not_pause_claims_for_good(shop: Shop) -> None:
    await shop.item()
    first, second = await shop.hold(shop.order(), shop.order())
    charger = shop.charger(ScriptedGateway())
    charger._breaker.failed(time.monotonic() - 60, alert=True)
    shop.plain_redis.set(keys.charge_lock(first.id), "somebody")
    assert (await charger.drain()).not_sent == 1
    assert (await charger.drain()).confirmed == 1
    assert shop.status(second) == "confirmed"


async def test_a_purchase_that_somebody_keeps_locked_delays_no_other_outcome(shop: Shop) -> None:
    records = await held(shop, 11)
    kept, others = records[4], records[:4] + records[5:]
    locked = asyncio.Event()

    async def answer(request: ChargeRequest) -> ChargeOutcome:
        await locked.wait()
        return Confirmed(f"ch_{request.reference}")

    gateway = ScriptedGateway(answer)
    draining = asyncio.create_task(shop.charger(gateway).drain())
    await until(lambda: gateway.under_way == 11)
    with shop.holding("SELECT FROM fairlane.purchases WHERE id = %s FOR UPDATE", kept.id):
        locked.set()
        await until(lambda: {shop.status(record) for record in others} == {"confirmed"})
        # Its own call still waits, and brings its outcome again; its lock is kept for as long.
        assert (shop.status(kept), draining.done()) == ("charging", False)
        await until(lambda: shop.plain_redis.keys("fairlane:lock:*") == [keys.charge_lock(kept.id)])
    async with asyncio.timeout(20):
        assert counts(await draining) == {"claimed": 11, "confirmed": 11}
    assert shop.stock() == (989, 0, 11)
    assert shop.plain_redis.keys("fairlane:lock:*") == []


async def test_slots_are_free_again_when_taking_the_locks_failed_for_whatever_reason(shop: Shop) -> None:
    class Broken(redis.asyncio.Redis):
        broken = True

        def pipeline(self, *args: Any, **kwargs: Any) -> Any:
            if self.broken:
                self.broken = False
                raise RuntimeError("a defect of ours")
            return super().pipeline(*args, **kwargs)

    await held(shop, 2)
    client = Broken.from_url(shop.settings.redis_url, decode_responses=True)
    settings = shop.with_settings(charge_slots=2, charge_retry=0.001)
    gateway = ScriptedGateway()
    charger = shop.charger(gateway, settings=settings, client=client)
    try:
        assert counts(await charger.drain()) == {"claimed": 2, "not_sent": 2}
        assert gateway.requests == []
        await until(lambda: len(shop.sql("SELECT id FROM fairlane.purchases WHERE due_at <= now()")) == 2)
        async with asyncio.timeout(20):
            assert counts(await charger.drain()) == {"claimed": 2, "confirmed": 2}
    finally:
        await client.aclose()


class LongCalls(ScriptedGateway):
    """A gateway whose calls may last."""

    capabilities = Capabilities(deduplicates=False, can_find=True, long_calls=True)


#: The shortest life of a narrow lock that goes with these, and room for a busy machine to start within.
SHORT_CALLS: dict[str, Any] = {"start_within": 1.0, "call_timeout": 0.1, "call_margin": 0.1, "charge_lock_ttl": 1.5}


async def test_a_call_longer_than_its_lock_lives_keeps_it_and_is_not_asked_about(shop: Shop) -> None:
    (bought,) = await held(shop)
    over = asyncio.Event()

    async def last(request: ChargeRequest) -> ChargeOutcome:
        await over.wait()
        return Confirmed("ch_1")

    settings = shop.with_settings(**SHORT_CALLS)
    gateway = LongCalls(last)
    gateway.records = {}  # asked now, it would say that it never charged
    charging = asyncio.create_task(shop.charger(gateway, settings=settings).drain())
    await until(lambda: gateway.under_way == 1)
    shop.plain_redis.set("a life", "", px=1_500)
    await until(lambda: not shop.plain_redis.exists("a life"))
    assert len((await shop.sweep().run_once()).in_doubt) == 1
    shop.sql("UPDATE fairlane.purchases SET call_deadline = now() - interval '1 hour', ask_at = now()")
    assert (await shop.reconciler(gateway, settings).run_once()).asked == 0
    assert shop.status(bought) == "in_doubt"

    over.set()
    assert counts(await charging) == {"claimed": 1, "confirmed": 1}
    assert (shop.status(bought), shop.stock()) == ("confirmed", (999, 0, 1))
    assert gateway.references == [bought.id]
    assert not shop.plain_redis.exists(keys.charge_lock(bought.id))


async def test_a_call_that_is_expected_to_be_short_is_not_renewed(shop: Shop) -> None:
    (bought,) = await held(shop)

    async def last(request: ChargeRequest) -> ChargeOutcome:
        await until(lambda: not shop.plain_redis.exists(keys.charge_lock(bought.id)))
        return Confirmed("ch_1")

    await shop.charger(ScriptedGateway(last), settings=shop.with_settings(**SHORT_CALLS)).drain()
    assert shop.status(bought) == "confirmed"


async def test_a_lock_lost_during_a_long_call_is_an_alert_and_its_outcome_counts_by_its_fence(shop: Shop) -> None:
    (bought,) = await held(shop)

    async def lose(request: ChargeRequest) -> ChargeOutcome:
        shop.plain_redis.set(keys.charge_lock(bought.id), "somebody else", px=60_000)
        await until(lambda: "lock_lost_during_call" in {entry["event"] for entry in logs})
        return Confirmed("ch_1")

    charger = shop.charger(LongCalls(lose), settings=shop.with_settings(**SHORT_CALLS))
    with structlog.testing.capture_logs() as logs:
        assert counts(await charger.drain()) == {"claimed": 1, "confirmed": 1}
    alerts = [entry["event"] for entry in logs if entry["log_level"] == "error"]
    assert alerts == ["lock_lost_during_call"]
    assert shop.status(bought) == "confirmed"
    assert shop.plain_redis.get(keys.charge_lock(bought.id)) == "somebody else"
    assert (await lock_metrics.read(shop.redis)).lost == 1
