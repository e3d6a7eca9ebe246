"""pytest-celery on processes: its nodes, clusters and setup without a container engine.

The plugin reaches for an engine only in its fixture ``docker_client``, never while importing or collecting.
The fixtures below need none that uses it; the last override makes sure that no other test does either. In a
conftest.py:

    @pytest.fixture
    def celery_broker(redis_url: str, redis_server: Server) -> ProcessBroker:
        return ProcessBroker(RedisContainer("broker", redis_server, url=redis_url))

    @pytest.fixture
    def celery_backend(redis_url: str, redis_server: Server) -> ProcessBackend:
        return ProcessBackend(RedisContainer("backend", redis_server, url=redis_url))

    @pytest.fixture
    def celery_setup_app(celery_setup_config: dict[str, str]) -> Iterator[Celery]:
        with connected_app("workers.app", celery_setup_config) as app:
            yield app

    @pytest.fixture
    def celery_worker(
        celery_broker: ProcessBroker, celery_backend: ProcessBackend, celery_setup_app: Celery, tmp_path: Path
    ) -> Iterator[ProcessWorker]:
        argv = ("--hostname", "lanes@%h", "--queues", "lane.00,lane.01", "--loglevel", "INFO")
        env = {"FAIRLANE_REDIS_URL": celery_broker.config()["url"], ...}
        with worker_process("workers.app", argv, env=env, log=tmp_path / "lanes.log") as process:
            container = WorkerContainer("lanes", process, WorkerOptions.read(argv))
            worker = ProcessWorker(container, celery_setup_app)
            assert worker.ready()
            yield worker

    @pytest.fixture
    def celery_setup_cls() -> type[ProcessSetup]:
        return ProcessSetup

    @pytest.fixture(scope="session")
    def docker_client() -> None:
        pytest.fail("a test asked for a container; use the process-backed fixtures")

The plugin's own ``celery_setup``, ``celery_*_cluster`` and ``celery_*_cluster_config`` then work as they are.
For several workers, override ``celery_worker_cluster`` and return ``CeleryWorkerCluster(first, second)``.

For a Procfile line, give the stack the environment `PING_TASK` beside the settings, and wrap what it started:
``WorkerContainer("lanes", stack["lanes"], WorkerOptions.read(shlex.split(stack.commands["lanes"])))``. A line
without ``--queues`` needs them named: ``WorkerOptions.read(words, queues=("lane.00",))``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import kombu.pools
from celery import Celery
from celery._state import get_current_app
from celery.app.utils import find_app
from pytest_celery import (
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestNode,
    CeleryTestSetup,
    CeleryTestWorker,
)
from pytest_docker_tools import exceptions as docker_errors

from tests.processes.containers import ProcessContainer, WorkerContainer
from tests.processes.process import READY_SECONDS, session_members, wait_for

# One round of remote control: a worker answers within milliseconds, so a silent second means a lost question.
PING_SECONDS = 1.0
# The plugin's own default for waiting for a log line or a result (its RESULT_TIMEOUT).
LOG_SECONDS = 60


class ProcessNode(CeleryTestNode):  # type: ignore[misc]
    """What a node gains from being a process: it can be paused, and waiting for its log is fine-grained."""

    container: ProcessContainer

    def pause(self) -> None:
        self.container.process.pause()

    def resume(self) -> None:
        self.container.process.resume()

    def wait_for_log(self, log: str, message: str = "", timeout: float = LOG_SECONDS) -> None:
        """Wait until any run has logged `log`. Raises the plugin's TimeoutError after `timeout` seconds."""
        if not wait_for(lambda: log in self.logs(), timeout):
            raise docker_errors.TimeoutError(message or f"{self.name()} did not log {log!r} within {timeout:g} s")


class ProcessBroker(ProcessNode, CeleryTestBroker):  # type: ignore[misc]
    """The broker of a setup."""


class ProcessBackend(ProcessNode, CeleryTestBackend):  # type: ignore[misc]
    """The result backend of a setup; may share its server with the broker."""


class ProcessWorker(ProcessNode, CeleryTestWorker):  # type: ignore[misc]
    """A worker of a setup, with the app that tests use to talk to it."""

    container: WorkerContainer

    def hostname(self) -> str:
        """The node name, ``lanes@<hostname>``, as remote control and Flower show it."""
        return self.container.options.node_name

    def get_running_processes_info(
        self, columns: list[str] | None = None, filters: dict[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """The worker's own processes, psutil's `columns` (default: all) of those that equal `filters`."""
        rows = [member.as_dict(columns) for member in session_members(self.container.process.pid)]
        return [row for row in rows if all(row.get(key) == value for key, value in (filters or {}).items())]


class ProcessSetup(CeleryTestSetup):  # type: ignore[misc]
    """The plugin's setup, but ``ready(control=True)`` means that every worker answered.

    The plugin's own check judges the answers that came, and so is content with none.
    """

    def _is_control_ping_ready(self, control: bool) -> bool:
        if not control:
            return True
        names = [worker.hostname() for worker in self.worker_cluster or ()]

        def all_answer() -> bool:
            replies = self.app.control.ping(destination=names, timeout=PING_SECONDS) or []
            return {name for reply in replies for name in reply if reply[name].get("ok") == "pong"} >= set(names)

        return wait_for(all_answer, READY_SECONDS)


@contextlib.contextmanager
def connected_app(module: str, config: Mapping[str, Any]) -> Iterator[Celery]:
    """The project's own app, as ``celery -A <module>`` finds it, current and pointed at a setup's servers.

    `config` holds Celery settings: ``broker_url``, ``result_backend``. On leaving, the settings are as before
    and no connection is kept, so the next setup may use other servers. What the app itself needs to be
    configured must be in this process's environment.
    """
    app = find_app(module)
    previous = get_current_app()
    before = {name: app.conf.get(name) for name in config}
    app.conf.update(config)
    app.set_current()
    try:
        yield app
    finally:
        _disconnect(app)
        app.conf.update(before)
        previous.set_current()


def _disconnect(app: Celery) -> None:
    """Drop broker pools and the result backend; Celery's own test app clears the same attributes."""
    inner = cast(Any, app)
    if inner._backend is not None:
        inner.backend.result_consumer.stop()
        inner.backend.client.close()
    inner._backend_cache = None
    inner._local.backend = None
    kombu.pools.reset()
    inner._pool = None
    inner.amqp._producer_pool = None
