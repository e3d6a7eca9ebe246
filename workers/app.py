"""The Celery app of the fleet, the one that `celery -A workers.app` loads.

This is the composition root of a worker: settings are read here, once, and a setting that cannot work ends the process
with one line. Connections are made later, in the process that uses them (`workers.process`).
"""

from __future__ import annotations

from typing import Any

from celery.signals import worker_init, worker_process_shutdown, worker_shutdown, worker_shutting_down
from sqlalchemy.exc import OperationalError

from shared.calling import make_celery
from shared.crash_points import arm_from_environment
from shared.database import cause, check_lanes, make_engine
from shared.errors import SettingsError
from shared.logs import configure_logging
from shared.settings import settings_or_exit
from workers.process import WorkerProcess, gateway_of
from workers.tasks import register

configure_logging()
arm_from_environment()
settings = settings_or_exit("payment_url")
app = make_celery(settings)
process = WorkerProcess(settings, app)
register(app, settings, process)


@worker_init.connect
def check_parts(**_: Any) -> None:
    """Before any fork: a worker for another number of lanes, or without its gateway, must not start."""
    engine = make_engine(settings)
    try:
        gateway_of(settings)
        with engine.connect() as connection:
            check_lanes(connection, settings.lanes)
    # SystemExit, as Celery only logs an ordinary exception of a signal's receiver and goes on.
    except SettingsError as error:
        raise SystemExit(f"fairlane: {error}") from None
    except OperationalError as error:
        raise SystemExit(f"fairlane: FAIRLANE_DATABASE_URL: the database does not answer ({cause(error)})") from None
    finally:
        engine.dispose()


@worker_shutting_down.connect
def stop(**_: Any) -> None:
    """A warm shutdown began: claim no more charges, finish the calls under way.

    The children that decide lanes do not see this signal; they give their lane up when its slice of time is over.
    """
    process.stop()


@worker_process_shutdown.connect
@worker_shutdown.connect
def close(**_: Any) -> None:
    """The last task has ended."""
    process.close()
