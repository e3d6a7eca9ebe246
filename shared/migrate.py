"""Bring the database to the schema this version needs, and lay out its lanes."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from shared.database import make_engine
from shared.errors import FairlaneError, LanesMismatchError
from shared.settings import Settings

_SCRIPTS = Path(__file__).parent / "migrations"

#: Advisory lock held while migrating: two release processes at once take turns. The number is arbitrary but ours.
_MIGRATION_LOCK = 4_037_201_116


def _config() -> Config:
    config = Config()
    # Alembic reads the option through configparser, where a % begins an interpolation.
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


def migrate(settings: Settings) -> str:
    """Run what is missing of the migrations in one transaction; safe to repeat and to run twice at once.

    Returns the revision reached. Raises LanesMismatchError, changing nothing, when the database was laid out for
    another number of lanes.
    """
    engine = make_engine(settings)
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            connection.execute(text("CREATE SCHEMA IF NOT EXISTS fairlane"))
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            _lay_out_lanes(connection, settings.lanes)
            return head_revision()
    finally:
        engine.dispose()


def head_revision() -> str:
    """The revision this version of the code needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise FairlaneError("this installation of Fairlane has no migrations")
    return head


def _lay_out_lanes(connection: Connection, lanes: int) -> None:
    found = connection.execute(text("SELECT count(*) FROM fairlane.lanes")).scalar_one()
    if found == 0:
        connection.execute(
            text("INSERT INTO fairlane.lanes (lane) SELECT generate_series(0, CAST(:lanes AS int) - 1)"),
            {"lanes": lanes},
        )
    elif found != lanes:
        raise LanesMismatchError(f"FAIRLANE_LANES: is {lanes}, but this database was laid out for {found} lanes")
