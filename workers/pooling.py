"""Celery's process pool, mended where the end of a process and a lost broker meet."""

from __future__ import annotations

from typing import Any

from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool


class SturdyPool(AsynPool):
    """Survives a broker that is lost just after one of its processes died."""

    def _track_child_process(self, proc: Any, hub: Any) -> None:
        # None: its end was noticed, and it waits to be replaced. To watch it again ends the worker with a ValueError.
        if getattr(proc, "_sentinel_poll", -1) is not None:
            super()._track_child_process(proc, hub)  # type: ignore[misc]  # missing from the stubs


class SturdyTaskPool(TaskPool):
    """What `worker_pool` names."""

    Pool = SturdyPool
