from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from ops.embedded import EmbeddedServers
from ops.embedded.ports import free_port
from shared.migrate import migrate
from shared.settings import Settings
from tests.integration.conftest import RunApi
from tests.integration.http_calls import ADMIN, SHOP, assert_problem, call
from tests.processes.process import OwnedProcess, child_environment, wait_for

TERMS = {"name": "Ticket", "stock": 5, "price": 4900, "currency": "EUR"}


async def test_a_healthy_process_lives_and_is_ready(api: str) -> None:
    assert (await call("GET", f"{api}/healthz")).json == {"status": "ok"}
    ready = await call("GET", f"{api}/readyz")
    assert (ready.status, ready.json) == (200, {"status": "ok", "parts": {"postgres": "ok", "redis": "ok"}})


@pytest.fixture
def own_servers(tmp_path: Path) -> Iterator[EmbeddedServers]:
    """Servers that a test may break."""
    with EmbeddedServers(tmp_path / "servers") as servers:
        migrate(Settings(database_url=servers.postgres.url, redis_url=servers.valkey.url))
        yield servers


@pytest.fixture
def own_api(own_servers: EmbeddedServers, run_api: RunApi) -> Iterator[str]:
    keys = {"FAIRLANE_API_KEYS": "shop:shop-secret:shop,admin:admin-secret:admin"}
    with run_api(own_servers.environment() | keys) as url:
        yield url


async def test_without_redis_it_lives_is_not_ready_and_still_keeps_items(
    own_api: str, own_servers: EmbeddedServers
) -> None:
    own_servers.valkey.stop()
    assert (await call("GET", f"{own_api}/healthz")).status == 200
    ready = await call("GET", f"{own_api}/readyz")
    assert_problem(ready, 503, "unavailable")
    assert ready.json["parts"] == {"postgres": "ok", "redis": "does not answer"}
    assert ready.headers["Retry-After"] == "1"
    metrics = await call("GET", f"{own_api}/metrics")
    assert (metrics.status, "fairlane_redis_up 0.0" in metrics.text) == (200, True)
    assert "fairlane_lock" not in metrics.text
    assert (await call("PUT", f"{own_api}/v1/items/health-1", ADMIN, TERMS)).status == 201
    assert (await call("PUT", f"{own_api}/v1/items/health-1", ADMIN, TERMS | {"stock": 6})).status == 200
    own_servers.valkey.start()
    assert (await call("GET", f"{own_api}/readyz")).status == 200
    assert "fairlane_lock_lost_total 0.0" in (await call("GET", f"{own_api}/metrics")).text


async def test_without_postgres_it_lives_is_not_ready_and_says_so(own_api: str, own_servers: EmbeddedServers) -> None:
    own_servers.postgres.stop()
    assert (await call("GET", f"{own_api}/healthz")).status == 200
    ready = await call("GET", f"{own_api}/readyz")
    assert_problem(ready, 503, "unavailable")
    assert ready.json["parts"] == {"postgres": "does not answer", "redis": "ok"}
    for answer in (
        await call("GET", f"{own_api}/v1/items/health-2", SHOP),
        await call("PUT", f"{own_api}/v1/items/health-2", ADMIN, TERMS),
    ):
        assert_problem(answer, 503, "unavailable")
        assert answer.headers["Retry-After"] == "1"
        assert "psycopg" not in answer.text
    own_servers.postgres.start()
    assert (await call("GET", f"{own_api}/v1/items/health-2", SHOP)).status == 404
    assert (await call("GET", f"{own_api}/readyz")).status == 200


async def test_a_part_that_hangs_is_named_and_asked_by_one_connection_only(
    own_api: str, own_servers: EmbeddedServers
) -> None:
    pid = own_servers.valkey.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            ready = await call("GET", f"{own_api}/readyz")
            assert ready.json["parts"] == {"postgres": "ok", "redis": "does not answer"}
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_database_that_lost_its_tables_is_not_ready(own_api: str, own_servers: EmbeddedServers) -> None:
    with psycopg.connect(own_servers.postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP SCHEMA fairlane CASCADE")
    ready = await call("GET", f"{own_api}/readyz")
    assert_problem(ready, 503, "unavailable")
    assert ready.json["parts"]["postgres"].startswith("is not migrated")
    item = await call("GET", f"{own_api}/v1/items/health-3", SHOP)
    assert_problem(item, 500, "internal-error")
    assert "items" not in item.json["detail"]


def _start(environment: dict[str, str], root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "producers"],
        env=child_environment(environment),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"FAIRLANE_API_KEYS": ""}, "FAIRLANE_API_KEYS"),
        ({"FAIRLANE_API_KEYS": "shop:hush-hush"}, "FAIRLANE_API_KEYS"),
        ({"FAIRLANE_LANES": "8"}, "FAIRLANE_LANES"),
        ({"FAIRLANE_PORT": "70000"}, "FAIRLANE_PORT"),
        ({"FAIRLANE_HOST": "203.0.113.1"}, "FAIRLANE_HOST"),
        ({"FAIRLANE_DATABASE_URL": "postgresql://u:hush-hush@127.0.0.1:1/x"}, "FAIRLANE_DATABASE_URL"),
    ],
)
def test_a_setting_that_cannot_work_ends_the_start_with_one_line_that_names_it(
    api_environment: dict[str, str], project_root: Path, wrong: dict[str, str], named: str
) -> None:
    ended = _start(api_environment | {"FAIRLANE_PORT": str(free_port())} | wrong, project_root)
    assert ended.returncode != 0
    plain = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert len(plain) == 1, ended.stderr
    assert plain[0].startswith("fairlane: ")
    assert named in plain[0]
    assert "hush-hush" not in ended.stderr


def test_a_port_in_use_ends_the_start_with_one_line(api_environment: dict[str, str], project_root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = _start(api_environment | {"FAIRLANE_PORT": port}, project_root)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert port in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(
    api_environment: dict[str, str], project_root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    argv = [sys.executable, "-m", "producers"]
    environment = api_environment | {"FAIRLANE_PORT": "0"}
    with OwnedProcess(argv, log=tmp_path / "api.log", env=environment, cwd=project_root) as process:
        process.wait_ready(lambda: "api_listening" in process.logs())
        process.send_signal(number)
        assert wait_for(lambda: not process.alive, 15)
        process.kill()
        assert process.exit_code == 0
        assert "Traceback" not in process.logs()
