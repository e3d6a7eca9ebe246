"""What is known of the narrow locks: how long they are waited for and held, how often refused and lost.

Each process counts in memory. The counts travel to Redis on a pipeline that is executed anyway, and are added up there
(`lock_count.lua`); the API reads the sums when it is asked for `/metrics`. They measure, they prove nothing: a flush
begins them again, and a reply that is lost may count one batch twice.

    wait      seconds from asking until obtained
    hold      seconds from obtained until the release was sent, which is after the commit
    refused   asked for, and somebody else had it
    lost      obtained, and at its renewal or release no longer ours

The one number to watch is the p99 of the hold against the life of a lock: from a half on, locks will soon expire under
calls that are still running. The process that holds them says so in its log, once a minute at most.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from redis.asyncio import Redis

from shared import keys
from shared.redis_clients import Pipeline, script

log = structlog.get_logger()

#: Upper bounds of the buckets, in seconds. Redis answers in well under a millisecond, and is given up after one second
#: (`REDIS_TIMEOUT`).
WAIT_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
#: A hold is a call and a commit: tens of milliseconds, at worst the call's 10 s. Close together around the half of a
#: lock's 30 s, as that is what the p99 is held against; up to an hour for calls without a short deadline.
HOLD_BOUNDS: Final = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 12.5, 15.0, 17.5, 20.0, 25.0, 30.0),
    *(60.0, 300.0, 3_600.0),
)

_KEYS: Final = (keys.LOCK_TOTALS, keys.LOCK_RECENT, keys.LOCK_BEFORE)

#: The share of a lock's life that the p99 of the hold may take. Above it a call twice as slow loses its lock.
ALERT_ABOVE: Final = 0.5

#: Seconds. The ratio looks back one to two windows: long enough for a p99, short enough to see trouble while it lasts.
_WINDOW: Final = 300
#: Holds that a process looks back on for its own p99. With fewer than a hundred, that is the slowest of them.
_LOOK_BACK: Final = 1_000
#: Seconds between two alerts of one process: trouble that goes on fills no log.
_ALERT_EVERY: Final = 60.0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations in seconds: how many in each bucket (the last is beyond all bounds), and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    def quantile(self, share: float) -> float | None:
        """The observation that this share of all are not above, estimated within its bucket as Prometheus does; None
        without observations. Beyond the last bound nothing is known: then it is that bound."""
        rank = share * sum(self.counts)
        if rank <= 0:
            return None
        below = 0
        for place, (bound, count) in enumerate(zip(self.bounds, self.counts, strict=False)):
            if below + count >= rank:
                start = self.bounds[place - 1] if place else 0.0
                return start + (bound - start) * (rank - below) / count
            below += count
        return self.bounds[-1]


@dataclass(frozen=True, slots=True)
class LockReadings:
    """What all processes together counted since Redis was last flushed."""

    acquired: int
    refused: int
    lost: int
    wait: Histogram
    hold: Histogram
    recent_hold: Histogram  #: The holds of the last 5 to 10 minutes.

    def hold_p99_share(self, ttl: float) -> float | None:
        """p99 of the recent holds / ttl; None if there were none."""
        p99 = self.recent_hold.quantile(0.99)
        return None if p99 is None else p99 / ttl


@dataclass(slots=True)
class _Held:
    obtained_at: float
    lives_until: float
    lost: bool = False


class LockMetrics:
    """What one process knows of its locks: those it holds, and counts that were not brought to Redis yet.

    Shared by all who take locks and let go of them on one event loop. Times are on the scale of `time.monotonic()`.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._held: dict[Hashable, _Held] = {}
        self._pending: defaultdict[str, float] = defaultdict(int)
        self._recent: deque[float] = deque(maxlen=_LOOK_BACK)
        self._alerted_at = -math.inf

    def obtained(self, lock: Hashable, asked_at: float) -> None:
        """It is ours, since just now. Its life is counted from the question: no answer can be older than that."""
        now = time.monotonic()
        lives_until = asked_at + self._ttl
        if held := self._held.get(lock):
            held.lives_until = lives_until
            return
        self._held[lock] = _Held(now, lives_until)
        self._count("acquired")
        self._observe("wait", WAIT_BOUNDS, now - asked_at)

    def refused(self) -> None:
        """Somebody else has it."""
        self._count("refused")

    def extended(self, lock: Hashable, asked_at: float) -> None:
        """It lives for a whole ttl from the question on."""
        if held := self._held.get(lock):
            held.lives_until = asked_at + self._ttl

    def lives_until(self, lock: Hashable) -> float | None:
        """When its life is over at the latest, unless it is extended; None if we do not hold it."""
        held = self._held.get(lock)
        return held.lives_until if held else None

    def lost(self, lock: Hashable) -> None:
        """It is no longer ours, though nobody here let go of it. Counted once per lock."""
        held = self._held.get(lock)
        if held and not held.lost:
            held.lost = True
            self._count("lost")

    def letting_go(self, lock: Hashable) -> bool:
        """Its release is about to be sent. Whether we believed until now that it is ours."""
        held = self._held.pop(lock, None)
        if held is None:
            return False
        seconds = time.monotonic() - held.obtained_at
        self._observe("hold", HOLD_BOUNDS, seconds)
        self._recent.append(seconds)
        if seconds > self._ttl * ALERT_ABOVE:
            self._alert()
        return not held.lost

    def lost_at_release(self) -> None:
        """It was gone when its release came."""
        self._count("lost")

    def abandon(self, lock: Hashable) -> None:
        """Nobody will let go of it: it is left to run out."""
        self._held.pop(lock, None)

    @property
    def pending(self) -> bool:
        """Whether anything was counted that is not on its way to Redis."""
        return bool(self._pending)

    def queue(self, pipe: Pipeline) -> Mapping[str, float]:
        """Queue what was counted on a pipeline, one command or none. Returns it, for `put_back` if that fails."""
        counted, self._pending = self._pending, defaultdict(int)
        if counted:
            pairs = [part for field, amount in counted.items() for part in (field, repr(amount))]
            pipe.eval(script("lock_count"), 3, *_KEYS, _WINDOW * 1000, *pairs)
        return counted

    def put_back(self, counted: Mapping[str, float]) -> None:
        """It did not arrive, as far as we know; it goes with the next pipeline."""
        for field, amount in counted.items():
            self._pending[field] += amount

    def _count(self, field: str) -> None:
        self._pending[field] += 1

    def _observe(self, name: str, bounds: Sequence[float], seconds: float) -> None:
        self._pending[_bucket(name, bisect_left(bounds, seconds), bounds)] += 1
        self._pending[f"{name}_sum"] += seconds

    def _alert(self) -> None:
        ordered = sorted(self._recent)
        p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
        now = time.monotonic()
        if p99 > self._ttl * ALERT_ABOVE and now - self._alerted_at >= _ALERT_EVERY:
            self._alerted_at = now
            log.error("locks_held_too_long", p99=round(p99, 3), ttl=self._ttl, holds=len(ordered))


async def read(client: Redis) -> LockReadings:
    """What all processes counted. Raises redis.RedisError when Redis does not answer."""
    async with client.pipeline(transaction=False) as pipe:
        for key in _KEYS:
            pipe.hgetall(key)
        totals, recent, before = await pipe.execute()
    lately = {
        field: float(recent.get(field, 0)) + float(before.get(field, 0)) for field in recent.keys() | before.keys()
    }
    return LockReadings(
        acquired=round(float(totals.get("acquired", 0))),
        refused=round(float(totals.get("refused", 0))),
        lost=round(float(totals.get("lost", 0))),
        wait=_histogram(totals, "wait", WAIT_BOUNDS),
        hold=_histogram(totals, "hold", HOLD_BOUNDS),
        recent_hold=_histogram(lately, "hold", HOLD_BOUNDS),
    )


def _bucket(name: str, place: int, bounds: Sequence[float]) -> str:
    """The field of one bucket. It names its bound, so that counts under other bounds are not taken for these."""
    return f"{name}_le_{bounds[place]:g}" if place < len(bounds) else f"{name}_le_inf"


def _histogram(fields: Mapping[str, str | float], name: str, bounds: tuple[float, ...]) -> Histogram:
    counts = (round(float(fields.get(_bucket(name, place, bounds), 0))) for place in range(len(bounds) + 1))
    return Histogram(bounds, tuple(counts), float(fields.get(f"{name}_sum", 0)))
