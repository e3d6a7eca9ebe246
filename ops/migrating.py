"""Migrating a database whose server may only be coming up: release runs when everything starts at once."""

from __future__ import annotations

import time

from sqlalchemy.exc import OperationalError

from shared.database import make_engine
from shared.errors import UnavailableError
from shared.migrate import migrate
from shared.settings import Settings

#: A server that was started together with us answers within seconds; recovery after a crash takes some more.
WAIT = 30.0
_LOOK_EVERY = 0.5

#: Answers of a server that will be ready. Any other refusal (a password, a name) does not mend by waiting.
_COMING_UP = ("starting up", "shutting down", "not yet accepting connections", "recovery mode")


def migrate_when_reachable(settings: Settings, *, wait: float = WAIT) -> str:
    """`shared.migrate.migrate`, once the server answers; returns the revision.

    Raises UnavailableError when it does not answer within `wait` seconds, or at once when it refuses us.
    """
    _wait_for_server(settings, wait)
    return migrate(settings)


def _wait_for_server(settings: Settings, wait: float) -> None:
    deadline = time.monotonic() + wait
    engine = make_engine(settings)
    try:
        while True:
            try:
                engine.connect().close()
                return
            except OperationalError as error:
                problem = " ".join(str(error.orig).split())
                refused = "FATAL:" in problem and not any(words in problem for words in _COMING_UP)
                if refused or time.monotonic() > deadline:
                    raise UnavailableError(f"FAIRLANE_DATABASE_URL: no connection to Postgres: {problem}") from None
            time.sleep(_LOOK_EVERY)
    finally:
        engine.dispose()
