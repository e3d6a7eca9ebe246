"""The two Celery tasks. Each is a claim check: it says where work is, and returns what came of it, never a purchase."""

from __future__ import annotations

from typing import Any

from celery import Celery

from shared.routing import CHARGE, DECIDE, Router
from shared.settings import Settings
from workers.process import WorkerProcess


def register(app: Celery, settings: Settings, process: WorkerProcess) -> None:
    """Register `purchases.decide` and `purchases.charge` on the app."""
    router = Router(settings.lanes)

    @app.task(name=DECIDE)
    def decide(**named: Any) -> dict[str, Any]:
        """Drain one lane, given as `lane=7` or by one of its items, `sku="sku-1"`.

        Returns `{decided, reserved, left, seconds}`.
        """
        return process.decide(router.lane(named)).as_result()

    @app.task(name=CHARGE)
    def charge() -> dict[str, Any]:
        """Charge what is due.

        Returns `{claimed, confirmed, declined, not_sent, in_doubt, seconds}`.
        """
        return process.charge().as_result()
