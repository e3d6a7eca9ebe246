"""Engines for Postgres, sync and async, and the check that a database is ours and laid out as the settings say.

Who ends what does not answer? Postgres ends statements that run too long and transactions whose process fell silent
(`LIMITS`); the kernel ends connections to a machine that is gone (`tcp_user_timeout`). A server that is frozen does
neither: its kernel still acknowledges. So a connection that is held too long is shut down from this side.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import structlog
from sqlalchemy import Connection, Engine, TextClause, create_engine, event, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from shared.errors import LanesMismatchError, SettingsError
from shared.settings import Settings

log = structlog.get_logger()

#: By it values are written as Postgres reads them.
_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]


def _engine_options(settings: Settings) -> dict[str, Any]:
    return {
        "pool_size": settings.database_pool,
        "max_overflow": 0,
        # Whoever waits this long for a connection waits behind others that get no answer either.
        "pool_timeout": settings.connection_timeout,
        # No pre-ping: a broken connection is found by the statement that needs it, and every statement of ours may
        # be repeated as a whole. A ping per checkout would cost a round trip per batch.
        "pool_pre_ping": False,
        "pool_recycle": 1_800,
        # The parameters hold payment tokens; an exception's text ends up in logs.
        "hide_parameters": True,
        "connect_args": {
            "application_name": "fairlane",
            # A server that went away without a word is noticed within seconds, also while we wait for its answer.
            "connect_timeout": 5,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    }


def make_engine(settings: Settings) -> Engine:
    """A pooled engine for the processes that decide. Made after a fork, never shared across one."""
    return create_engine(settings.database_url, **_engine_options(settings))


def make_async_engine(settings: Settings, *, held_for: float | None = None) -> AsyncEngine:
    """A pooled engine for the processes that run on one event loop: the API, the charges, the sweep.

    A connection that is not given back within `held_for` seconds (`CONNECTION_TIMEOUT`, unless the work is longer by
    nature) is shut down; whoever waits on it gets an OperationalError. The processes that decide are bounded by the
    time limit of their task instead.
    """
    engine = create_async_engine(settings.database_url, **_engine_options(settings))
    _bound_checkouts(engine.sync_engine, held_for or settings.connection_timeout)
    return engine


def _bound_checkouts(engine: Engine, seconds: float) -> None:
    """Hang up on connections that are held for longer. Cancelling the waiter would not do: to end a statement in good
    order, psycopg waits for the same server again."""

    def hang_up(connection: psycopg.AsyncConnection[Any]) -> None:
        log.error("postgres_does_not_answer", seconds=seconds)
        if not connection.closed:
            with socket.socket(fileno=os.dup(connection.fileno())) as ours:
                ours.shutdown(socket.SHUT_RDWR)

    @event.listens_for(engine, "checkout")
    def watch(connection: Any, record: ConnectionPoolEntry, _: object) -> None:
        loop = asyncio.get_running_loop()
        record.info["watch"] = loop.call_later(seconds, hang_up, connection.driver_connection)

    @event.listens_for(engine, "checkin")
    def unwatch(_: object, record: ConnectionPoolEntry) -> None:
        if watching := record.info.pop("watch", None):
            watching.cancel()


LIMITS = text("""
SELECT set_config('idle_in_transaction_session_timeout', :idle, true),
       set_config('lock_timeout', :lock, true),
       set_config('statement_timeout', :statement, true),
       set_config('enable_bitmapscan', 'off', true),
       set_config('enable_seqscan', 'off', true)
""")
"""Promise: a stalled process wedges nothing. Postgres ends its transaction, and with it every lock it holds. Local to
the transaction, so that it also holds behind PgBouncer.

And neither bitmap nor sequential scans: what we read are the first rows of an index in its order, or rows by their
keys. In a rush the planner's statistics are from before, when the tables were small and nobody waited, and by them it
would as soon read the whole line and sort it, or a whole table, for every batch."""


def limits(settings: Settings) -> dict[str, str]:
    """The values of `LIMITS`."""
    return {
        "idle": f"{settings.idle_in_transaction_timeout * 1000:.0f}ms",
        "lock": f"{settings.lock_timeout * 1000:.0f}ms",
        "statement": f"{settings.statement_timeout * 1000:.0f}ms",
    }


def literal(statement: TextClause, values: Mapping[str, Any]) -> str:
    """The statement with its values written into it. Without parameters, several may go in one message."""
    compiled = statement.bindparams(**values).compile(dialect=_DIALECT, compile_kwargs={"literal_binds": True})
    return str(compiled).strip()


@asynccontextmanager
async def transaction(engine: AsyncEngine, settings: Settings) -> AsyncIterator[AsyncConnection]:
    """A transaction that writes, within the limits: committed at the end, rolled back by an exception."""
    async with engine.begin() as connection:
        await connection.execute(LIMITS, limits(settings))
        yield connection


def check_lanes(connection: Connection, lanes: int) -> None:
    """Raise SettingsError unless the database is migrated and was laid out for this many lanes.

    With another number an item would be looked for in a lane where it is not.
    """
    try:
        found = connection.execute(text("SELECT count(*) FROM fairlane.lanes")).scalar_one()
    except ProgrammingError as error:
        raise SettingsError(f"FAIRLANE_DATABASE_URL: run `fairlane migrate` first ({cause(error)})") from error
    if found != lanes:
        raise LanesMismatchError(f"FAIRLANE_LANES: is {lanes}, but this database was laid out for {found} lanes")


def cause(error: BaseException) -> str:
    """What may be logged of a failure: its kind and, from Postgres, the state. Its text may quote a row, and rows hold
    payment tokens."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    state = getattr(original, "sqlstate", None)
    return f"{type(original).__name__} ({state})" if state else type(original).__name__


#: SQLSTATE classes that speak of the server and not of our statement: connection, a read-only or broken transaction,
#: one that could not be finished, resources, a time that ran out, shutdown, system.
_PASSING_STATES = ("08", "25", "40", "53", "55", "57", "58")


def is_passing(error: BaseException) -> bool:
    """Whether Postgres is the trouble and not what it was asked: the same statement may succeed later."""
    if isinstance(error, PoolTimeoutError | OSError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if not isinstance(state, str):
        # Without a state it never reached the server, or the connection broke.
        return error.connection_invalidated or isinstance(error.orig, psycopg.OperationalError | psycopg.InterfaceError)
    return state.startswith(_PASSING_STATES)
