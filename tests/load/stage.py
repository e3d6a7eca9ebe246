"""One API process on embedded servers of its own, and a shop beside it that buys and decides."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from ops.embedded import EmbeddedServers
from ops.embedded.ports import free_port
from shared.migrate import migrate
from shared.settings import Settings
from tests.integration.shopfloor import Shop, open_shop
from tests.processes.process import OwnedProcess

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stage:
    """What a measurement uses. `rss` is the memory of the API process in bytes."""

    url: str
    shop: Shop
    process: psutil.Process

    @property
    def rss(self) -> int:
        return int(self.process.memory_info().rss)

    @property
    def cpu(self) -> float:
        """Processor seconds the API process has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@asynccontextmanager
async def open_stage() -> AsyncIterator[Stage]:
    """Everything started, and ended with the block."""
    with tempfile.TemporaryDirectory(prefix="fairlane-load-") as folder, EmbeddedServers(Path(folder)) as servers:
        port = free_port()
        environment = servers.environment() | {
            "FAIRLANE_API_KEYS": "shop:shop-secret:shop",
            "FAIRLANE_PORT": str(port),
        }
        settings = Settings.model_validate(
            {name.removeprefix("FAIRLANE_").lower(): value for name, value in environment.items()}
        )
        await asyncio.to_thread(migrate, settings)
        url = f"http://127.0.0.1:{port}"
        argv = [sys.executable, "-m", "producers"]
        with OwnedProcess(argv, log=Path(folder) / "api.log", env=environment, cwd=_ROOT, name="api") as api:
            await asyncio.to_thread(api.wait_ready, lambda: _answers(f"{url}/readyz"))
            async with open_shop(settings) as shop:
                yield Stage(url, shop, psutil.Process(api.pid))


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310  # a URL of this measurement
            return True
    except OSError:
        return False
