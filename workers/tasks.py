"""The Celery tasks. Each is a claim check: it says where work is, and returns what came of it, never a purchase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from sqlalchemy.exc import DBAPIError

from shared.database import cause
from shared.errors import UnavailableError
from shared.routing import CHARGE, DECIDE, RECONCILE, Router
from shared.settings import Settings
from workers.process import WorkerProcess


def register(app: Celery, settings: Settings, process: WorkerProcess) -> None:
    """Register `purchases.decide`, `purchases.charge` and `purchases.reconcile` on the app."""
    router = Router(settings.lanes)

    # Celery ends the process and starts another. The charges, in threads, are bounded connection by connection.
    @app.task(name=DECIDE, time_limit=settings.decide_limit)
    def decide(**named: Any) -> dict[str, Any]:
        """Drain one lane, given as `lane=7` or by one of its items, `sku="sku-1"`.

        Returns `{decided, reserved, left, seconds}`.
        """
        with _without_quoting_rows():
            return process.decide(router.lane(named)).as_result()

    @app.task(name=CHARGE)
    def charge() -> dict[str, Any]:
        """Charge what is due.

        Returns `{claimed, confirmed, declined, not_sent, in_doubt, seconds}`.
        """
        with _without_quoting_rows():
            return process.charge().as_result()

    @app.task(name=RECONCILE)
    def reconcile() -> dict[str, Any]:
        """Ask the provider about purchases in doubt.

        Returns `{asked, settled, postponed, rechecked, found_late}`.
        """
        with _without_quoting_rows():
            return process.reconcile().as_result()


@contextmanager
def _without_quoting_rows() -> Iterator[None]:
    """A task's exception goes to the log, the events and Flower; that of a database may quote a row with its token."""
    try:
        yield
    except DBAPIError as error:
        raise UnavailableError(f"Postgres failed: {cause(error)}") from None
