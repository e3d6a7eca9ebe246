"""One real API process for the tests of the HTTP API. They share it: each uses item names of its own."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psycopg
import pytest

from ops.embedded import EmbeddedServers
from ops.embedded.ports import free_port
from tests.processes.process import OwnedProcess

#: Two secrets of one client: it is replacing one by the other.
API_KEYS = "shop:shop-secret:shop,shop:shop-secret-2:shop,other:other-secret:shop,admin:admin-secret:admin"

#: Starts an API process with these settings, gives its base URL once it serves, and stops it.
RunApi = Callable[[Mapping[str, str]], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def api_environment(servers: EmbeddedServers) -> dict[str, str]:
    """The settings of the shared API process: a database of its own, which lives as long as the servers."""
    server_url = servers.postgres.url.replace("+psycopg", "").rpartition("/")[0]
    with psycopg.connect(f"{server_url}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE shared_api TEMPLATE fairlane")
    return {
        "FAIRLANE_DATABASE_URL": f"{server_url}/shared_api",
        "FAIRLANE_REDIS_URL": servers.valkey.url,
        "FAIRLANE_API_KEYS": API_KEYS,
    }


@pytest.fixture(scope="session")
def run_api(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> RunApi:
    """For tests that need an API process to themselves."""

    @contextmanager
    def run(environment: Mapping[str, str]) -> Iterator[str]:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        process = OwnedProcess(
            [sys.executable, "-m", "producers"],
            log=tmp_path_factory.mktemp("api") / "api.log",
            env={**environment, "FAIRLANE_PORT": str(port)},
            cwd=project_root,
            name="api",
        )
        with process:
            process.wait_ready(lambda: _answers(f"{url}/readyz"))
            yield url

    return run


@pytest.fixture(scope="session")
def api(api_environment: dict[str, str], run_api: RunApi) -> Iterator[str]:
    """The base URL of the shared API process."""
    with run_api(api_environment) as url:
        yield url


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310  # a URL of this test
            return True
    except OSError:
        return False
