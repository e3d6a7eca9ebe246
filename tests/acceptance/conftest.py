"""One running service that all tests share which only buy; each uses items of its own."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from ops.embedded import EmbeddedServers
from tests.acceptance.service import SELLING, Service, running_service
from tests.acceptance.shop import Shop

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def service(
    servers: EmbeddedServers, project_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The whole Procfile, Flower included. Its Valkey may be flushed, its processes are to be left running."""
    directory = tmp_path_factory.mktemp("service")
    with running_service(servers, directory, project_root / "Procfile", (*SELLING, "flower")) as running:
        yield running


@pytest.fixture
async def shop(service: Service) -> AsyncIterator[Shop]:
    """A client of the shared service, with as many connections as it has requests under way."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Shop(session, service.url)


@pytest.fixture
def sku() -> str:
    """The name of an item that no other test uses."""
    return f"item-{next(_numbers)}"
