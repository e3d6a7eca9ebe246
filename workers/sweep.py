"""The sweep: the loop that heals. It calls what was forgotten; it decides and charges nothing itself.

`python -m workers.sweep` runs it every `FAIRLANE_SWEEP_EVERY` seconds. Any number of these processes may run; an
advisory lock lets one at a time work.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from shared import statuses
from shared.calling import CHARGES_CALL, Caller, lane_call, make_celery
from shared.database import cause, check_lanes, make_async_engine, transaction
from shared.errors import SettingsError
from shared.logs import configure_logging
from shared.redis_clients import make_async_redis
from shared.settings import Settings, settings_or_exit
from shared.statements import sweep as sql

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Swept:
    """What one round found: the lanes with work, their watermarks, and whether charges are due.

    `ours` is False when another sweep was at work; the rest is then empty.
    """

    ours: bool
    lanes: tuple[int, ...] = ()
    watermarks: tuple[tuple[int, int], ...] = ()
    charges_due: bool = False


class Sweep:
    """One round of healing, `run_once`, and the loop around it."""

    def __init__(self, engine: AsyncEngine, redis: Redis, caller: Caller, settings: Settings) -> None:
        self._engine = engine
        self._redis = redis
        self._caller = caller
        self._settings = settings

    async def run_once(self) -> Swept:
        """Look once, then call what has work. A call that is already out is not repeated (`called:<queue>`)."""
        swept = await self._look()
        if not swept.ours:
            return swept
        await self._refresh_watermarks(swept)
        calls = [lane_call(lane) for lane in swept.lanes]
        if swept.charges_due:
            calls.append(CHARGES_CALL)
        await asyncio.to_thread(self._caller.call, calls)
        return swept

    async def run(self, stop: asyncio.Event) -> None:
        """Sweep until told to stop. A round that fails is logged; the next one begins afresh."""
        while not stop.is_set():
            try:
                await self.run_once()
            except (SQLAlchemyError, OSError) as error:
                log.warning("sweep_failed", error=cause(error))
            try:
                await asyncio.wait_for(stop.wait(), self._settings.sweep_every)
            except TimeoutError:
                continue

    async def _look(self) -> Swept:
        async with transaction(self._engine, self._settings) as connection:
            if not (await connection.execute(sql.TRY_TO_BE_THE_ONE, {"lock": sql.SWEEP_LOCK})).scalar_one():
                return Swept(ours=False)
            lanes = (await connection.execute(sql.LANES)).mappings().all()
            moving = (await connection.execute(sql.LANES_WITH_MOVING_WAITLISTS)).scalars().all()
            due = (await connection.execute(sql.CHARGES_DUE)).scalar_one()
        return Swept(
            ours=True,
            lanes=tuple(sorted({row["lane"] for row in lanes if row["queued"]} | set(moving))),
            watermarks=tuple((row["lane"], row["decided_through"]) for row in lanes),
            charges_due=due,
        )

    async def _refresh_watermarks(self, swept: Swept) -> None:
        """Write the watermarks again: Redis may have lost them, or missed the last one."""
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for lane, decided_through in swept.watermarks:
                    statuses.queue_watermark(pipe, lane, decided_through)
                await pipe.execute()
        except RedisError as error:
            log.warning("watermarks_not_refreshed", error=str(error))


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
    settings = settings_or_exit()
    try:
        asyncio.run(_main(settings))
    except SettingsError as error:
        raise SystemExit(f"fairlane: {error}") from None
    except OperationalError as error:
        raise SystemExit(f"fairlane: FAIRLANE_DATABASE_URL: the database does not answer ({cause(error)})") from None


if __name__ == "__main__":
    main()
