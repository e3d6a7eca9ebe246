"""Celery's process pool, mended where the end of a process and a lost broker meet."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool


class SturdyPool(AsynPool):
    """Survives a broker that is lost just after one of its processes died."""

    def maintain_pool(self) -> None:
        """Replace processes that ended. Called when one ends, when a broker is lost, and every five seconds."""
        # Between its end and its being noticed, a process keeps its pipes, and there are none for its successor: its
        # turn comes the next time. Raised, this ends the worker.
        with suppress(StopIteration):
            super().maintain_pool()

    def _track_child_process(self, proc: Any, hub: Any) -> None:
        # None: its end was noticed, and it waits to be replaced. To watch it again ends the worker with a ValueError.
        if getattr(proc, "_sentinel_poll", -1) is not None:
            super()._track_child_process(proc, hub)  # type: ignore[misc]  # missing from the stubs


class SturdyTaskPool(TaskPool):
    """What `worker_pool` names."""

    Pool = SturdyPool
