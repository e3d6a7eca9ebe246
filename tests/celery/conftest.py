"""pytest-celery's fixtures for the project's own app: Valkey as broker, the Procfile's worker as worker, no container.

A worker here is the `lanes` line under a name of its own, so that several fit on one machine.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery
from honcho.environ import parse_procfile

from ops.embedded import EmbeddedValkey
from tests.celery.line import Line
from tests.processes.celery_nodes import ProcessBackend, ProcessBroker, ProcessSetup, ProcessWorker, connected_app
from tests.processes.containers import RedisContainer, WorkerContainer, WorkerOptions, worker_process

APP = "workers.app"

_numbers = itertools.count(1)


class ValkeyServer:
    """An embedded Valkey as pytest-celery's containers ask for it."""

    def __init__(self, valkey: EmbeddedValkey) -> None:
        self._valkey = valkey

    @property
    def pid(self) -> int:
        return self._valkey.pid or 0

    @property
    def alive(self) -> bool:
        return self._valkey.pid is not None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._valkey.kill()

    def pause(self) -> None:
        raise NotImplementedError("no test here needs a paused broker")

    def resume(self) -> None:
        raise NotImplementedError("no test here needs a paused broker")

    def restart(self) -> None:
        self._valkey.stop()
        self._valkey.start()

    def logs(self) -> str:
        return self._valkey.log.read_text()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """The broker's server: not the one that the other tests flush."""
    server = EmbeddedValkey(tmp_path_factory.mktemp("broker"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def celery_broker(valkey: EmbeddedValkey) -> ProcessBroker:
    broker = ProcessBroker(RedisContainer("broker", ValkeyServer(valkey), url=valkey.url))
    broker.container.client.flushall()
    assert broker.ready()
    return broker


@pytest.fixture
def celery_backend(valkey: EmbeddedValkey) -> ProcessBackend:
    """The plugin's setup wants one. Nobody reads it: our tasks store no results."""
    return ProcessBackend(RedisContainer("backend", ValkeyServer(valkey), url=valkey.url))


@pytest.fixture
def worker_environment(environment: dict[str, str], celery_broker: ProcessBroker) -> dict[str, str]:
    """An empty database, and the broker as the only Redis."""
    return environment | {"FAIRLANE_REDIS_URL": celery_broker.config()["url"]}


@pytest.fixture
def celery_setup_app(
    celery_setup_config: dict[str, str], worker_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Celery]:
    for name, value in worker_environment.items():
        monkeypatch.setenv(name, value)  # the app reads its settings when it is imported
    with connected_app(APP, celery_setup_config) as app:
        yield app


@pytest.fixture
def start_worker(
    worker_environment: dict[str, str], celery_setup_app: Celery, project_root: Path, tmp_path: Path
) -> Iterator[Callable[..., ProcessWorker]]:
    """Starts the Procfile's lanes worker as `<name>@<host>`, with further settings; all of them end with the test."""
    words = shlex.split(dict(parse_procfile((project_root / "Procfile").read_text()).processes)["lanes"])
    started = []

    def start(name: str = "lanes", **settings: str) -> ProcessWorker:
        argv = words[words.index("worker") + 1 :]
        argv[argv.index("--hostname") + 1] = f"{name}@%h"
        process = worker_process(
            APP, argv, env=worker_environment | settings, cwd=project_root, log=tmp_path / f"{name}.log"
        )
        started.append(process.start())
        options = WorkerOptions.read(argv, queues=["lane.00"])
        return ProcessWorker(WorkerContainer(name, process, options), celery_setup_app)

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.finish()


@pytest.fixture
def celery_worker(start_worker: Callable[..., ProcessWorker]) -> ProcessWorker:
    worker = start_worker()
    assert worker.ready()
    return worker


@pytest.fixture
def celery_setup_cls() -> type[ProcessSetup]:
    return ProcessSetup


@pytest.fixture(scope="session")
def docker_client() -> None:
    pytest.fail("a test asked for a container; these run on processes")


@pytest.fixture
def line(worker_environment: dict[str, str]) -> Iterator[Line]:
    """Items and purchases as the API accepts them, but without a call: whether a lane is called is up to the test."""
    with Line.open(worker_environment) as opened:
        yield opened
