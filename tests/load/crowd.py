"""`python -m tests.load.crowd [5000] [--stock 100]`: so many buyers at once for little stock, on the whole service.

Prints how long each took to be told how it ended: refused at the door, or final. The crowd, the service and the
provider share one machine. `tests/acceptance/test_crowd.py` asks what is true whatever the time.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import aiohttp

from ops.embedded import EmbeddedServers
from tests.acceptance.service import running_service
from tests.acceptance.shop import Shop

_ROOT = Path(__file__).parents[2]
#: Requests under way at once: what the door must answer, and what a client of the same machine can play.
_AT_ONCE = 250


async def measure(url: str, buyers: int, stock: int) -> None:
    """One sale of one item."""
    took: defaultdict[str, list[float]] = defaultdict(list)
    at_once = asyncio.Semaphore(_AT_ONCE)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        shop = Shop(session, url)
        await shop.put_item("crowd", stock=stock)

        async def buyer() -> None:
            async with at_once:
                sent = time.monotonic()
                reply = await shop.buy("crowd")
            end = reply.slug or str((await shop.final(reply.body["id"]))["status"])
            took[end].append(time.monotonic() - sent)

        await asyncio.gather(*(buyer() for _ in range(buyers)))
    for end, seconds in sorted(took.items()):
        seconds.sort()
        print(
            f"{end:12} {len(seconds):6}  median {seconds[len(seconds) // 2]:.3f}"
            f"  p99 {seconds[int(len(seconds) * 0.99)]:.3f}  last {seconds[-1]:.3f} s"
        )


def main() -> None:
    """Everything started, measured, and ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("buyers", nargs="?", type=int, default=5_000)
    parser.add_argument("--stock", type=int, default=100)
    wanted = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="fairlane-load-") as directory,
        EmbeddedServers(Path(directory) / "servers") as servers,
        running_service(servers, Path(directory), _ROOT / "Procfile") as service,
    ):
        asyncio.run(measure(service.url, wanted.buyers, wanted.stock))


if __name__ == "__main__":
    main()
