"""The sweep: the loop that heals. It decides and charges nothing itself. Each round it

- marks in doubt what was claimed and has no outcome by its deadline (Postgres' clock, and nothing else, judges that);
- ends holds that ran out, and gives their stock back to whoever waits;
- calls lanes, charges and reconciliation that have work, in case a call was lost;
- calls a lane, or the charges, again when whoever is first there has not moved since the last round, whatever the mark
  says: whoever heard the call may have died or be frozen;
- writes the watermarks to Redis again, in case that was flushed.

`python -m workers.sweep` runs it every `FAIRLANE_SWEEP_EVERY` seconds. Any number of these processes may run; an
advisory lock lets one at a time work.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import RowMapping
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shared import doors, statuses
from shared.calling import CHARGES_CALL, RECONCILE_CALL, Caller, lane_call, make_celery
from shared.crash_points import arm_from_environment, crash_point
from shared.database import cause, check_lanes, make_async_engine, transaction
from shared.doors import Door
from shared.errors import SettingsError
from shared.logs import configure_logging
from shared.purchases import PurchaseRecord
from shared.redis_clients import make_async_redis
from shared.routing import CHARGES_QUEUE, queue_of
from shared.settings import Settings, settings_or_exit
from shared.statements import charge, recover
from shared.statements import sweep as sql

log = structlog.get_logger()

#: Rounds without a move of its first purchase after which a queue is called in spite of its mark. The second time is
#: for a call that a frozen worker's open connection swallowed. No more: a lane that is kept locked would collect
#: workers. One that nobody has locked is called in every further round.
_UNHEARD_AFTER = frozenset({1, 3})

#: Overdue claims and ended holds per round. The next round comes in half a second; more would hold the items' locks.
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Swept:
    """What one round found and did.

    `ours` is False when another sweep was at work; the rest is then empty.
    """

    ours: bool
    lanes: tuple[int, ...] = ()
    #: Queues of which whoever was called last seems not to have heard it.
    unheard: tuple[str, ...] = ()
    watermarks: tuple[tuple[int, int], ...] = ()
    charges_due: bool = False
    questions_due: bool = False
    holds_ended: bool = False
    in_doubt: tuple[PurchaseRecord, ...] = ()
    expired: tuple[PurchaseRecord, ...] = ()
    doors: tuple[Door, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """Holds that were ended, the door records of their items, and the lanes where somebody waits for those."""

    records: tuple[PurchaseRecord, ...] = ()
    doors: tuple[Door, ...] = ()
    lanes: tuple[int, ...] = ()

    def __add__(self, other: Ended) -> Ended:
        return Ended(self.records + other.records, self.doors + other.doors, self.lanes + other.lanes)


class Sweep:
    """One round of healing, `run_once`, and the loop around it."""

    def __init__(self, engine: AsyncEngine, redis: Redis, caller: Caller, settings: Settings) -> None:
        self._engine = engine
        self._redis = redis
        self._caller = caller
        self._settings = settings
        #: By queue, who was first in it at the last round, and for how many rounds since.
        self._heads: dict[str, tuple[int, int]] = {}

    async def run_once(self) -> Swept:
        """One round. A call that is already out (`called:<queue>`) is repeated only for a lane that does not move."""
        swept = await self._look()
        if not swept.ours:
            return swept
        if swept.holds_ended:
            swept = await self._end_holds(swept)
        crash_point("sweep.after_commit")
        for record in swept.in_doubt:
            log.warning("purchase_in_doubt", purchase=record.id)
        await self._publish(swept)
        calls = [lane_call(lane) for lane in swept.lanes]
        if swept.charges_due:
            calls.append(CHARGES_CALL)
        unheard = [call for call in calls if call.queue in swept.unheard]
        calls = [call for call in calls if call.queue not in swept.unheard]
        if swept.questions_due:
            calls.append(RECONCILE_CALL)
        if calls or unheard:
            await asyncio.to_thread(self._caller.call, calls, unheard=unheard)
        return swept

    async def run(self, stop: asyncio.Event) -> None:
        """Sweep until told to stop. A round that fails is logged; the next one begins afresh."""
        while not stop.is_set():
            pause = self._settings.sweep_every
            try:
                swept = await self.run_once()
                if swept.lanes or swept.charges_due:
                    # Somebody waits: whether they move is seen by the next round, which then comes sooner.
                    pause /= 2
            except (SQLAlchemyError, OSError) as error:
                log.warning("sweep_failed", error=cause(error))
            try:
                await asyncio.wait_for(stop.wait(), pause)
            except TimeoutError:
                continue

    async def _look(self) -> Swept:
        """Mark what is overdue, and see who has work."""
        async with transaction(self._engine, self._settings) as connection:
            if not (await connection.execute(sql.TRY_TO_BE_THE_ONE, {"lock": sql.SWEEP_LOCK})).scalar_one():
                return Swept(ours=False)
            due = (await connection.execute(sql.DUE)).mappings().one()
            overdue: Sequence[RowMapping] = ()
            moving: Sequence[int] = ()
            if due["claims_overdue"]:
                overdue = (await connection.execute(recover.MARK_IN_DOUBT, {"batch": _BATCH})).mappings().all()
            if due["somebody_waits"]:
                moving = (await connection.execute(sql.LANES_WITH_MOVING_WAITLISTS)).scalars().all()
            lanes = (await connection.execute(sql.LANES)).mappings().all()
            crash_point("sweep.before_commit")
        heads = {row["lane"]: row["head"] for row in lanes if row["head"] is not None}
        charges = {} if due["first_due"] is None else {CHARGES_QUEUE: due["first_due"]}
        unheard = self._unheard({queue_of(lane): head for lane, head in heads.items()} | charges)
        return Swept(
            ours=True,
            lanes=tuple(sorted(heads.keys() | set(moving))),
            unheard=tuple({*unheard, *await self._deserted(heads)}),
            watermarks=tuple((row["lane"], row["decided_through"]) for row in lanes),
            charges_due=bool(charges),
            # Who came to be in doubt just now is to be asked about at once.
            questions_due=due["questions_due"] or bool(overdue),
            holds_ended=due["holds_ended"],
            in_doubt=tuple(PurchaseRecord.from_row(row) for row in overdue),
        )

    def _unheard(self, heads: dict[str, int]) -> tuple[str, ...]:
        """The queues that have had the same purchase first for so many rounds that they are to be called again."""
        self._heads = {
            queue: (head, self._heads[queue][1] + 1 if self._heads.get(queue, (0, 0))[0] == head else 0)
            for queue, head in heads.items()
        }
        return tuple(queue for queue, (_, rounds) in self._heads.items() if rounds in _UNHEARD_AFTER)

    async def _deserted(self, lanes: Iterable[int]) -> list[str]:
        """The queues of those lanes that did not move since the last round, and that nobody decides: a call was lost.

        So a lane whose worker froze is decided soon after Postgres took its lock away, whoever swallowed a call until
        then.
        """
        standing = [lane for lane in lanes if self._heads[queue_of(lane)][1] > 0]
        if not standing:
            return []
        # A transaction of its own: what it locks for a moment keeps a decider waiting.
        async with transaction(self._engine, self._settings) as connection:
            free = (await connection.execute(sql.FREE_LANES, {"lanes": standing})).scalars().all()
        return [queue_of(lane) for lane in free]

    async def _end_holds(self, swept: Swept) -> Swept:
        """End the holds that ran out, and call the lanes where somebody waits for them.

        Transactions of their own, as they wait for items: one that somebody keeps, or whose books do not add up, must
        stop neither the rest of the sweep nor the holds of other items.
        """
        ended = await self._end_holds_of(None)
        if ended is None:
            async with self._engine.connect() as connection:
                items = (await connection.execute(recover.ITEMS_WITH_ENDED_HOLDS)).scalars().all()
            each = [await self._end_holds_of(item) for item in items]
            ended = sum((found for found in each if found is not None), start=Ended())
        lanes = tuple(sorted({*swept.lanes, *ended.lanes}))
        return replace(swept, lanes=lanes, expired=ended.records, doors=ended.doors)

    async def _end_holds_of(self, item: str | None) -> Ended | None:
        """The ended holds of one item, or of all; None if that failed."""
        try:
            async with transaction(self._engine, self._settings) as connection:
                values = {"batch": _BATCH, "item": item}
                rows = (await connection.execute(recover.EXPIRE, values)).mappings().all()
                expired = tuple(PurchaseRecord.from_row(row) for row in rows)
                moved_doors = await self._return_stock(connection, expired)
                skus = {"skus": [door.sku for door in moved_doors]}
                lanes = (await connection.execute(charge.LANES_WITH_WAITLISTS, skus)).scalars().all()
        except (SQLAlchemyError, OSError) as error:
            log.warning("holds_not_ended", item=item, error=cause(error))
            return None
        return Ended(expired, moved_doors, tuple(lanes))

    async def _return_stock(self, connection: AsyncConnection, expired: tuple[PurchaseRecord, ...]) -> tuple[Door, ...]:
        """Give back what these holds held, in the transaction that ended them."""
        returned: Counter[str] = Counter()
        for record in expired:
            returned[record.item] += record.quantity
        if not returned:
            return ()
        skus = sorted(returned)
        await connection.execute(charge.LOCK_ITEMS, {"skus": skus})
        values = {"skus": skus, "returned": [returned[sku] for sku in skus], "sold": [0] * len(skus)}
        rows = (await connection.execute(charge.SETTLE_STOCK, values)).mappings().all()
        return tuple(Door.from_row(row) for row in rows)

    async def _publish(self, swept: Swept) -> None:
        """Statuses and door records of what changed, and all watermarks, as Redis may have lost them."""
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                statuses.queue_write(pipe, [*swept.in_doubt, *swept.expired], self._settings)
                doors.queue_write(pipe, swept.doors, self._settings)
                for lane, decided_through in swept.watermarks:
                    statuses.queue_watermark(pipe, lane, decided_through)
                await pipe.execute()
        except RedisError as error:
            log.warning("sweep_not_published", error=str(error))


async def _main(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        engine = make_async_engine(settings)
        stack.push_async_callback(engine.dispose)
        async with engine.connect() as connection:
            await connection.run_sync(check_lanes, settings.lanes)
        redis = make_async_redis(settings)
        stack.push_async_callback(redis.aclose)
        await Sweep(engine, redis, Caller(settings, make_celery(settings)), settings).run(stop)


def main() -> None:
    """Run the sweep until SIGTERM or Ctrl-C; a setting that cannot work ends it with one line."""
    configure_logging()
    arm_from_environment()
    settings = settings_or_exit()
    try:
        asyncio.run(_main(settings))
    except SettingsError as error:
        raise SystemExit(f"fairlane: {error}") from None
    except OperationalError as error:
        raise SystemExit(f"fairlane: FAIRLANE_DATABASE_URL: the database does not answer ({cause(error)})") from None


if __name__ == "__main__":
    main()
