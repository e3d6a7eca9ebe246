"""The project's own Celery app and real workers: who is called, who decides, and what a killed worker costs."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_celery import CeleryTestSetup, CeleryWorkerCluster
from sqlalchemy import text

from shared.routing import DECIDE, queue_of
from tests.celery.line import Line
from tests.processes.celery_nodes import ProcessWorker
from tests.processes.process import wait_for
from tests.processes.procfile import ProcfileStack

#: A decision takes milliseconds; a worker on a busy machine may be some seconds late.
WITHIN = 30.0


def test_a_call_by_item_has_its_lane_decided(celery_setup: CeleryTestSetup, line: Line) -> None:
    assert celery_setup.ready(ping=False, control=True, docker=True)
    assert celery_setup.worker.hostname() == f"lanes@{socket.gethostname()}"
    lane = line.add_item("mug", stock=3)
    line.accept("mug", 5)

    sent = celery_setup.app.send_task(DECIDE, kwargs={"sku": "mug"})

    assert wait_for(lambda: "queued" not in line.statuses("mug"), WITHIN)
    assert line.statuses("mug") == ["reserved"] * 3 + ["waitlisted"] * 2
    celery_setup.worker.wait_for_log(f"Task {DECIDE}[{sent.id}] succeeded", timeout=WITHIN)
    assert results(celery_setup.worker) == [(5, 3)]
    queues = celery_setup.app.control.inspect([celery_setup.worker.hostname()], timeout=5).active_queues()
    assert queue_of(lane) in {queue["name"] for queue in queues[celery_setup.worker.hostname()]}


def test_a_message_sent_while_the_worker_is_away_waits_for_it(celery_setup: CeleryTestSetup, line: Line) -> None:
    worker = celery_setup.worker
    line.add_item("mug", stock=3)
    line.accept("mug", 2)
    worker.kill()
    assert worker.container.status == "exited"

    celery_setup.app.send_task(DECIDE, kwargs={"sku": "mug"})
    assert line.statuses("mug") == ["queued"] * 2
    worker.restart()

    assert wait_for(lambda: line.statuses("mug") == ["reserved"] * 2, WITHIN)


def test_a_call_that_died_with_its_worker_is_made_again_by_the_sweep(
    celery_setup: CeleryTestSetup,
    line: Line,
    worker_environment: dict[str, str],
    project_root: Path,
    tmp_path: Path,
) -> None:
    worker = celery_setup.worker
    redis = celery_setup.broker.container.client
    lane = line.add_item("mug", stock=3)
    line.accept("mug", 4)

    with line.engine.begin() as connection:
        # Somebody has the lane, so the worker that takes the message waits for it, and is killed while it waits.
        connection.execute(text("SELECT 1 FROM fairlane.lanes WHERE lane = :lane FOR UPDATE"), {"lane": lane})
        celery_setup.app.send_task(DECIDE, kwargs={"lane": lane})
        assert wait_for(lambda: waits_for_a_lock(line), WITHIN)
        worker.kill()
    assert redis.llen(queue_of(lane)) == 0, "the message is gone"
    assert line.statuses("mug") == ["queued"] * 4, "nothing was written"
    redis.close()

    worker.restart()
    with ProcfileStack(project_root / "Procfile", env=worker_environment, logs=tmp_path, lines=["sweep"]):
        assert wait_for(lambda: "queued" not in line.statuses("mug"), WITHIN)
    assert line.statuses("mug") == ["reserved"] * 3 + ["waitlisted"]


class TestTwoWorkers:
    """Two workers of four processes each, called to the same lanes again and again."""

    ITEMS = ("mug", "tee", "cap", "pin")
    STOCK = 40
    BUYERS = 150

    @pytest.fixture
    def celery_worker_cluster(self, start_worker: Callable[..., ProcessWorker]) -> CeleryWorkerCluster:
        # Small batches and short slices: each lane changes hands many times.
        settings = {"FAIRLANE_DECIDE_BATCH": "10", "FAIRLANE_DECIDE_SLICE": "0.005"}
        workers = [start_worker(name, **settings) for name in ("first", "second")]
        cluster = CeleryWorkerCluster(*workers)
        assert all(worker.ready() for worker in workers)
        return cluster

    def test_no_purchase_is_decided_twice(self, celery_setup: CeleryTestSetup, line: Line) -> None:
        assert celery_setup.ready(ping=False, control=True, docker=True)
        for sku in self.ITEMS:
            line.add_item(sku, self.STOCK, waitlist=False)
            line.accept(sku, self.BUYERS)

        for _ in range(10):
            for sku in self.ITEMS:
                celery_setup.app.send_task(DECIDE, kwargs={"sku": sku})
        assert wait_for(lambda: all("queued" not in line.statuses(sku) for sku in self.ITEMS), WITHIN)

        for sku in self.ITEMS:
            bought = line.purchases(sku)
            refused = self.BUYERS - self.STOCK
            assert [row["status"] for row in bought] == ["reserved"] * self.STOCK + ["sold_out"] * refused
            assert {row["rev"] for row in bought} == {2}, "accepted, then decided, once"
        assert line.rows("SELECT DISTINCT available, unpaid FROM fairlane.items") == [
            {"available": 0, "unpaid": self.STOCK}
        ]
        first, second = celery_setup.worker_cluster
        total = len(self.ITEMS) * self.BUYERS
        assert wait_for(lambda: sum(decided for decided, _ in results(first) + results(second)) == total, WITHIN)
        for worker in (first, second):
            assert any(decided for decided, _ in results(worker)), f"{worker.hostname()} took part"


def results(worker: ProcessWorker) -> list[tuple[int, int]]:
    """Decided and reserved, of every decision a worker logged."""
    logged = re.findall(rf"Task {DECIDE}\[\S+\] succeeded in \S+ \{{'decided': (\d+), 'reserved': (\d+)", worker.logs())
    return [(int(decided), int(reserved)) for decided, reserved in logged]


def waits_for_a_lock(line: Line) -> bool:
    """Whether some other connection to this database waits for a lock."""
    return bool(
        line.rows("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
    )
