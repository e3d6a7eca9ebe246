"""Engines for Postgres, sync and async, and the check that a database is ours and laid out as the settings say."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from shared.errors import LanesMismatchError, SettingsError
from shared.settings import Settings


def _engine_options(settings: Settings) -> dict[str, Any]:
    return {
        "pool_size": settings.database_pool,
        "max_overflow": 0,
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


def make_async_engine(settings: Settings) -> AsyncEngine:
    """A pooled engine for the processes that run on one event loop: the API, the charges, the sweep."""
    return create_async_engine(settings.database_url, **_engine_options(settings))


def check_lanes(connection: Connection, lanes: int) -> None:
    """Raise SettingsError unless the database is migrated and was laid out for this many lanes.

    With another number an item would be looked for in a lane where it is not.
    """
    try:
        found = connection.execute(text("SELECT count(*) FROM fairlane.lanes")).scalar_one()
    except DBAPIError as error:
        raise SettingsError(f"FAIRLANE_DATABASE_URL: run `fairlane migrate` first ({cause(error)})") from error
    if found != lanes:
        raise LanesMismatchError(f"FAIRLANE_LANES: is {lanes}, but this database was laid out for {found} lanes")


def cause(error: BaseException) -> str:
    """What may be logged of a failure: its kind and, from Postgres, the state. Its text may quote a row, and rows hold
    payment tokens."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    state = getattr(original, "sqlstate", None)
    return f"{type(original).__name__} ({state})" if state else type(original).__name__
