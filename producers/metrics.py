"""`/metrics`, for Prometheus: what the charge workers counted of their locks, read from Redis at each scrape.

Nothing is counted in this process, so any API process gives the same answer, and there is nothing to add up over
processes. Without Redis the answer is still 200: `fairlane_redis_up` is 0 and the families of the locks are missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from redis import RedisError

from producers.failures import describe
from producers.parts import Parts
from shared import lock_metrics
from shared.lock_metrics import Histogram, LockReadings

log = structlog.get_logger()

router = APIRouter(tags=["health"])


@router.get("/metrics", summary="What Prometheus scrapes", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    """The narrow locks of all charge workers: how long they are waited for and held, how often refused and lost."""
    parts: Parts = request.app.state.parts
    try:
        readings = await lock_metrics.read(parts.redis)
    except (RedisError, OSError) as error:
        log.warning("lock_metrics_not_read", **describe(error))
        readings = None
    families = _Families([_redis_up(readings is not None)])
    if readings is not None:
        families.add(_of_locks(readings, parts.settings.charge_lock_ttl))
    return PlainTextResponse(generate_latest(families), media_type=CONTENT_TYPE_LATEST)


class _Families(Collector):
    """What was read for one scrape."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = list(families)

    def add(self, families: Iterator[Metric]) -> None:
        self._families += families

    def collect(self) -> Sequence[Metric]:
        return self._families


def _redis_up(answers: bool) -> Metric:
    return GaugeMetricFamily("fairlane_redis_up", "Whether Redis answered this API process.", value=int(answers))


def _of_locks(readings: LockReadings, ttl: float) -> Iterator[Metric]:
    yield _histogram(
        "fairlane_lock_wait_seconds", "From asking for a narrow lock until it was obtained.", readings.wait
    )
    yield _histogram(
        "fairlane_lock_hold_seconds",
        "From obtaining a narrow lock until its release after the commit.",
        readings.hold,
    )
    for name, means, value in (
        ("acquired", "Narrow locks obtained.", readings.acquired),
        ("refused", "Narrow locks asked for that somebody else had.", readings.refused),
        ("lost", "Narrow locks obtained, and no longer ours at renewal or release.", readings.lost),
    ):
        yield CounterMetricFamily(f"fairlane_lock_{name}", means, value=value)
    share = readings.hold_p99_share(ttl)
    ratio = GaugeMetricFamily(
        "fairlane_lock_hold_p99_ttl_ratio",
        "p99 of the holds of the last minutes / CHARGE_LOCK_TTL. Alert above 0.5. No sample without holds.",
    )
    if share is not None:
        ratio.add_metric([], share)
    yield ratio


def _histogram(name: str, means: str, observed: Histogram) -> Metric:
    buckets, so_far = [], 0
    for bound, count in zip((*observed.bounds, math.inf), observed.counts, strict=True):
        so_far += count
        buckets.append(("+Inf" if math.isinf(bound) else repr(bound), float(so_far)))
    return HistogramMetricFamily(name, means, buckets=buckets, sum_value=observed.total)
