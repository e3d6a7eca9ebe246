"""What one API process owns, opened together and closed in reverse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from producers.accept import Acceptor
from producers.admit import Admission
from producers.auth import Authenticator
from producers.cancel import Canceller
from producers.key_file import KeyFile, authenticator_of
from producers.reading import Reader
from producers.waiting import Hub
from shared.calling import Caller, make_celery
from shared.database import check_lanes, make_async_engine
from shared.redis_clients import make_async_redis
from shared.settings import Settings


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts a handler may use, found under `app.state.parts`."""

    settings: Settings
    engine: AsyncEngine
    redis: Redis
    caller: Caller
    authenticator: Authenticator
    key_file: KeyFile | None
    admission: Admission
    acceptor: Acceptor
    canceller: Canceller
    reader: Reader
    hub: Hub


@asynccontextmanager
async def open_parts(settings: Settings) -> AsyncIterator[Parts]:
    """Open everything; on leaving, finish what was accepted, then close.

    Raises SettingsError when the database is not migrated or was laid out for another number of lanes, or the file of
    API keys cannot be used.
    """
    async with AsyncExitStack() as stack:
        authenticator, key_file = await stack.enter_async_context(authenticator_of(settings))
        engine = make_async_engine(settings)
        stack.push_async_callback(engine.dispose)
        async with engine.connect() as connection:
            await connection.run_sync(check_lanes, settings.lanes)
        redis = make_async_redis(settings)
        stack.push_async_callback(redis.aclose)
        hub = await stack.enter_async_context(Hub(redis, settings))
        caller = Caller(settings, make_celery(settings))
        acceptor = Acceptor(engine, redis, caller, settings)
        stack.push_async_callback(acceptor.close)
        canceller = Canceller(engine, redis, caller, settings)
        stack.push_async_callback(canceller.close)
        yield Parts(
            settings=settings,
            engine=engine,
            redis=redis,
            caller=caller,
            authenticator=authenticator,
            key_file=key_file,
            admission=Admission(engine, redis, settings),
            acceptor=acceptor,
            canceller=canceller,
            reader=Reader(engine, redis, settings),
            hub=hub,
        )
