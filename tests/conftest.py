"""Real servers for all tests: one Postgres and one Valkey per run; per test its own database and an empty Redis."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import psycopg
import pytest
from redis import Redis

from ops.embedded import EmbeddedServers
from shared.migrate import migrate
from shared.settings import Settings
from tests.integration.shopfloor import Shop, open_shop

# No deadline per example: a busy machine is no defect.
hypothesis.settings.register_profile("fairlane", deadline=None)
hypothesis.settings.load_profile("fairlane")

_numbers = itertools.count(1)

API_KEYS = "shop:shop-secret:shop,other:other-secret:shop,admin:admin-secret:admin"


@pytest.fixture(scope="session", autouse=True)
def _no_inherited_settings() -> None:
    """Whoever runs the tests may have settings of a real installation in the environment. None of them count here."""
    for name in list(os.environ):
        if name.startswith("FAIRLANE_"):
            del os.environ[name]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, _no_inherited_settings: None) -> Iterator[EmbeddedServers]:
    """The servers of this run. Their database `fairlane` is migrated and stays empty: tests get copies of it."""
    with EmbeddedServers(tmp_path_factory.mktemp("servers")) as running:
        migrate(Settings(database_url=running.postgres.url, redis_url=running.valkey.url))
        yield running


@pytest.fixture
def environment(servers: EmbeddedServers) -> Iterator[dict[str, str]]:
    """The settings of a fresh installation as environment variables: an empty database of its own, an empty Redis."""
    plain_url = servers.postgres.url.replace("+psycopg", "")
    name = f"test_{next(_numbers)}"
    with psycopg.connect(plain_url.rpartition("/")[0] + "/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE fairlane")
    with Redis.from_url(servers.valkey.url) as redis:
        redis.flushall()
    yield {
        "FAIRLANE_DATABASE_URL": plain_url.rpartition("/")[0] + f"/{name}",
        "FAIRLANE_REDIS_URL": servers.valkey.url,
        "FAIRLANE_API_KEYS": API_KEYS,
        "FAIRLANE_PAYMENT_URL": "http://127.0.0.1:9",  # nobody listens on the discard port
    }
    with psycopg.connect(plain_url.rpartition("/")[0] + "/postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def settings(environment: dict[str, str]) -> Settings:
    """The same as one frozen object."""
    values = {name.removeprefix("FAIRLANE_").lower(): value for name, value in environment.items()}
    return Settings.model_validate(values)


@pytest.fixture
async def shop(settings: Settings) -> AsyncIterator[Shop]:
    """A small shop on these settings, and everything it opened closed at the end."""
    async with open_shop(settings) as opened:
        yield opened


@pytest.fixture(scope="session")
def project_root() -> Path:
    """Where the Procfile is."""
    return Path(__file__).parent.parent
