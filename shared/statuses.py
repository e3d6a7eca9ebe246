"""Statuses in Redis: what clients poll. A copy, versioned by the row, that Postgres can always replace.

A status is believed as it is when
- it is final: final states never change; or
- it is queued, its place in the line is beyond the lane's `decided through`, so that nobody has looked at it yet, and
  it was written within the last half a minute; or
- it is young (`STATUS_FRESH`).

Everything else (old, missing, contradictory) is read from Postgres, see `producers.reading`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from redis.asyncio import Redis

from shared import keys
from shared.purchases import PurchaseRecord
from shared.redis_clients import Pipeline, script
from shared.settings import Settings
from shared.states import Status

#: Seconds after which a watermark that nobody wrote again, or a queued status, is no longer believed, and queued
#: purchases are read from Postgres: while Redis takes no writes (no memory, no disk), it goes on to say what was true
#: before. One read per purchase and half a minute is next to nothing, as they are read in groups.
WATERMARK_TTL = 30

#: Statuses written in one call of the script. It runs alone on the server: a hundred take it 2 ms, in which everybody
#: else waits, the buyers of other items as well.
_AT_ONCE = 100

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(PurchaseRecord).decode


@dataclass(frozen=True, slots=True)
class CachedStatus:
    """A record found in Redis, its age in seconds, and the watermark of its lane (None if unknown)."""

    record: PurchaseRecord
    age: float
    decided_through: int | None

    def believable(self, fresh: float) -> bool:
        """Whether it may be answered without asking Postgres."""
        if self.record.final:
            return True
        if self.record.status is Status.QUEUED and self.decided_through is not None:
            # Queued below the watermark is a contradiction: it was decided, or committed late. Postgres knows. Beyond
            # it nobody has decided it; but it may have been cancelled, by an API process that died of it.
            return self.record.seq > self.decided_through and self.age <= WATERMARK_TTL
        return self.age <= fresh


def queue_write(pipe: Pipeline, records: Sequence[PurchaseRecord], settings: Settings) -> None:
    """Queue the write of these statuses on a pipeline; an older revision never overwrites a newer one.

    Whoever waits for one of them is told, by messages on the channel `keys.CHANGED`.
    """
    for start in range(0, len(records), _AT_ONCE):
        part = records[start : start + _AT_ONCE]
        args: list[str | int | bytes] = [int(settings.status_ttl * 1000), keys.CHANGED]
        for record in part:
            args += (record.rev, _encode(record))
        pipe.eval(script("write_statuses"), len(part), *(keys.purchase(r.id) for r in part), *args)


def queue_watermark(pipe: Pipeline, lane: int, decided_through: int) -> None:
    """Queue the write of a lane's watermark.

    An older one may come late and stand for a moment. That only hides decisions whose statuses, which are versioned,
    were written with them. It is soon gone unless it is written again, which the sweep does in every round.
    """
    pipe.set(keys.decided(lane), decided_through, px=WATERMARK_TTL * 1000)


def queue_missing_watermark(pipe: Pipeline, lane: int, decided_through: int) -> None:
    """Queue the write of a lane's watermark, unless there is one: that is as new, or newer."""
    pipe.set(keys.decided(lane), decided_through, px=WATERMARK_TTL * 1000, nx=True)


async def read_many(client: Redis, purchase_ids: Sequence[str], lanes: int) -> list[CachedStatus | None]:
    """What Redis knows of these purchases, in their order; None where it knows nothing.

    Raises redis.RedisError when it does not answer.
    """
    async with client.pipeline(transaction=False) as pipe:
        # Statuses before watermarks: a watermark read later can only be newer, which errs on the side of asking.
        pipe.eval(script("read_statuses"), len(purchase_ids), *map(keys.purchase, purchase_ids))
        pipe.mget([keys.decided(lane) for lane in range(lanes)])
        replies, watermarks = await pipe.execute()
    found: list[CachedStatus | None] = []
    for age, json in zip(replies[::2], replies[1::2], strict=True):
        if age < 0:
            found.append(None)
            continue
        try:
            record = _decode(json)
        except msgspec.DecodeError:
            # Written by another version of this program: Postgres knows, and its answer replaces this one.
            found.append(None)
            continue
        watermark = watermarks[record.lane]
        found.append(CachedStatus(record, age / 1000, None if watermark is None else int(watermark)))
    return found
