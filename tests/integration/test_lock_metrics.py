"""What is told of the narrow locks: counted where they are taken and let go of, added up in Redis, shown by the API."""

from __future__ import annotations

import asyncio
import math
import time

import pytest
import structlog.testing
from prometheus_client.parser import text_string_to_metric_families
from redis.exceptions import ConnectionError as RedisConnectionError

from shared import keys, lock_metrics
from shared.lock_metrics import HOLD_BOUNDS, Histogram, LockMetrics
from shared.narrow_lock import Lock, NarrowLock
from shared.redis_clients import script
from tests.integration.http_calls import call
from tests.integration.shopfloor import ScriptedGateway, Shop, until
from workers.gateways import ChargeOutcome, ChargeRequest, Confirmed, InDoubt

A, B, C = (Lock(f"fairlane:lock:charge:{name}", "worker-1:1") for name in "abc")
OTHERS_A = Lock(A.key, "worker-2:2")

#: A window that never ends within a test, in milliseconds.
WINDOW = 600_000


async def held(shop: Shop, number: int) -> None:
    await shop.item(stock=100)
    await shop.hold(*(shop.order() for _ in range(number)))
    shop.forget_calls()


async def scrape(api: str) -> dict[str, float]:
    """Every sample of /metrics, asked without a key."""
    answer = await call("GET", f"{api}/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def test_a_sale_is_seen_by_whoever_scrapes_the_api(shop: Shop, api: str) -> None:
    await held(shop, 12)
    lost, refused = (row["id"].hex for row in shop.purchases()[:2])
    shop.plain_redis.set(keys.charge_lock(refused), "somebody else", px=600_000)

    async def answer(request: ChargeRequest) -> ChargeOutcome:
        await asyncio.sleep(0.02)  # the part of a hold that is certain
        if request.reference == lost:
            shop.plain_redis.delete(keys.charge_lock(lost))
        return Confirmed(f"ch_{request.reference}")

    await shop.charger(ScriptedGateway(answer), settings=shop.with_settings(charge_slots=4)).drain()

    samples = await scrape(api)
    assert samples["fairlane_redis_up"] == 1
    assert samples["fairlane_lock_acquired_total"] == 11
    assert samples["fairlane_lock_refused_total"] == 1
    assert samples["fairlane_lock_lost_total"] == 1
    for name in ("wait", "hold"):
        buckets = [value for sample, value in samples.items() if sample.startswith(f"fairlane_lock_{name}_seconds_b")]
        assert buckets == sorted(buckets)
        assert samples[f"fairlane_lock_{name}_seconds_bucket[+Inf]"] == 11
        assert samples[f"fairlane_lock_{name}_seconds_count"] == 11
    assert samples["fairlane_lock_hold_seconds_bucket[0.01]"] == 0
    assert samples["fairlane_lock_hold_seconds_sum"] >= 11 * 0.02
    assert 0 < samples["fairlane_lock_wait_seconds_sum"] < samples["fairlane_lock_hold_seconds_sum"]
    assert 0.02 / shop.settings.charge_lock_ttl <= samples["fairlane_lock_hold_p99_ttl_ratio"] < 1


async def test_before_the_first_lock_there_is_no_ratio(shop: Shop, api: str) -> None:
    samples = await scrape(api)
    assert samples["fairlane_lock_hold_seconds_count"] == samples["fairlane_lock_acquired_total"] == 0
    assert "fairlane_lock_hold_p99_ttl_ratio" not in samples
    assert not shop.plain_redis.exists(keys.LOCK_TOTALS)


async def test_a_hold_lasts_until_after_the_commit(shop: Shop) -> None:
    await held(shop, 1)
    with shop.holding("SELECT FROM fairlane.items FOR NO KEY UPDATE"):
        began = time.monotonic()
        charging = asyncio.create_task(shop.charger(ScriptedGateway(Confirmed("ch_1"))).drain())
        await shop.someone_waits_for_a_lock()
        waiting_since = time.monotonic()
        # Longer than everything before: the call alone cannot have been that long.
        await until(lambda: time.monotonic() - waiting_since > waiting_since - began)
        waited = time.monotonic() - waiting_since
    await charging

    assert (await lock_metrics.read(shop.redis)).hold.total >= waited


async def test_questions_are_counted_as_well(shop: Shop) -> None:
    await held(shop, 1)
    gateway = ScriptedGateway(InDoubt("timeout"))
    await shop.charger(gateway).drain()
    await shop.reconciler(gateway).run_once()  # no answer: postponed, its lock released

    readings = await lock_metrics.read(shop.redis)
    assert (readings.acquired, sum(readings.hold.counts), readings.lost) == (2, 2, 0)


async def test_a_flush_begins_the_counts_again_and_costs_nothing_else(shop: Shop) -> None:
    locks = NarrowLock(shop.redis, 30)
    for flushed in range(2):
        await locks.acquire([A, B])
        await locks.release([A, B])
        assert (await lock_metrics.read(shop.redis)).acquired == 2, flushed
        shop.plain_redis.flushall()
    assert (await lock_metrics.read(shop.redis)).acquired == 0


async def test_what_could_not_be_told_is_told_later(shop: Shop) -> None:
    metrics = LockMetrics(30)
    locks = NarrowLock(shop.redis, 30, metrics)
    await locks.acquire([A])
    assert await locks.acquire([OTHERS_A]) == [False]
    with pytest.raises(RedisConnectionError):
        await NarrowLock(shop.redis_that_is_down(), 30, metrics).release([A])
    await NarrowLock(shop.redis_that_is_down(), 30, metrics).tell()
    assert (await lock_metrics.read(shop.redis)).acquired == 0

    await locks.tell()
    readings = await lock_metrics.read(shop.redis)
    assert (readings.acquired, readings.refused, sum(readings.hold.counts)) == (1, 1, 1)


async def test_a_lock_that_nobody_had_obtained_cannot_be_lost_or_held(shop: Shop) -> None:
    locks = NarrowLock(shop.redis, 30)
    assert await locks.acquire([A]) == [True]
    await NarrowLock(shop.redis, 30).release([OTHERS_A, B])
    await locks.release([C])
    await locks.tell()

    readings = await lock_metrics.read(shop.redis)
    assert (readings.lost, sum(readings.hold.counts)) == (0, 0)


async def test_the_ratio_forgets_what_was_two_windows_ago(shop: Shop) -> None:
    def count(field: str) -> None:
        names = (keys.LOCK_TOTALS, keys.LOCK_RECENT, keys.LOCK_BEFORE)
        shop.plain_redis.eval(script("lock_count"), 3, *names, WINDOW, field, "1")

    def window_ends() -> None:
        for key in (keys.LOCK_RECENT, keys.LOCK_BEFORE):
            # And a moment more: within the same millisecond a window that is just over still stands.
            if not shop.plain_redis.pexpire(key, max(int(shop.plain_redis.pttl(key)) - WINDOW - 1, 0)):
                assert not shop.plain_redis.exists(key)

    count("hold_le_1")
    assert 0 < shop.plain_redis.pttl(keys.LOCK_RECENT) - WINDOW <= WINDOW
    window_ends()
    count("hold_le_5")
    readings = await lock_metrics.read(shop.redis)
    assert sum(readings.recent_hold.counts) == 2  # this window and the one before
    assert 1 < (readings.hold_p99_share(1) or 0) <= 5
    window_ends()
    count("hold_le_1")
    readings = await lock_metrics.read(shop.redis)
    assert sum(readings.recent_hold.counts) == 2
    window_ends()
    count("hold_le_1")
    readings = await lock_metrics.read(shop.redis)
    assert (readings.hold_p99_share(1) or math.inf) <= 1
    assert sum(readings.hold.counts) == 4  # the totals forget nothing


def test_a_quantile_lies_within_the_bucket_of_its_observation() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert Histogram(bounds, (0, 0, 0, 0), 0).quantile(0.99) is None
    assert Histogram(bounds, (100, 0, 0, 0), 50).quantile(0.5) == 0.5
    assert Histogram(bounds, (50, 40, 10, 0), 0).quantile(0.95) == 3.0
    assert Histogram(bounds, (98, 0, 2, 0), 0).quantile(0.99) == 3.0
    assert Histogram(bounds, (0, 0, 0, 7), 700).quantile(0.99) == 4.0  # all that is known
    assert list(HOLD_BOUNDS) == sorted(set(HOLD_BOUNDS))


def test_holds_beyond_half_of_a_locks_life_are_an_alert_once_in_a_while() -> None:
    def alerts(ttl: float) -> list[float]:
        metrics = LockMetrics(ttl)
        with structlog.testing.capture_logs() as logs:
            for lock in (A, B, C):
                metrics.obtained(lock, time.monotonic())
                metrics.letting_go(lock)
        return [entry["ttl"] for entry in logs if entry["log_level"] == "error"]

    assert alerts(1e-9) == [1e-9]  # each of the three was held for longer than that
    assert alerts(60) == []


def test_one_slow_call_in_a_thousand_is_no_alert() -> None:
    metrics = LockMetrics(1e-9)  # A is held for longer than that
    metrics._recent.extend([0.0] * 999)
    with structlog.testing.capture_logs() as logs:
        metrics.obtained(A, time.monotonic())
        metrics.letting_go(A)
    assert logs == []
