"""Buyers who insist: each keeps its idempotency key and asks again until it hears something definite."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import aiohttp

#: One request may take this long before its buyer asks again. Shorter than any fault, so that faults are felt.
ANSWER_WITHIN = 2.0
#: Pause before asking again; a client of a real shop waits longer.
ASK_AGAIN_AFTER = 0.1
#: Seconds after the last fault in which everybody must have heard something definite.
ANSWERED_WITHIN = 40.0


class Crowd:
    """Buyers of these items, one after another at `rate` per second, any number of them under way at once.

    `tokens` are payment tokens, of which each buyer draws one: `tok_visa` pays. All chances come from `random`.
    """

    def __init__(
        self, url: str, skus: Sequence[str], *, rate: float, tokens: Sequence[str], random: Random, limit: int | None
    ) -> None:
        self.url = url
        self.skus = list(skus)
        #: The purchase that each key was told, for every 202 and 200.
        self.accepted: dict[str, str] = {}
        #: Definite refusals, by the kind of problem.
        self.refused: Counter[str] = Counter()
        #: Answers that were none: connection errors, timeouts, 503.
        self.troubles: Counter[str] = Counter()
        self._rate = rate
        self._tokens = tokens
        self._random = random
        self._limit = limit
        self._buyers: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []

    @property
    def asked(self) -> int:
        """How many buyers came."""
        return len(self.accepted) + self.refused.total() + len(self._buyers)

    async def come(self, session: aiohttp.ClientSession) -> None:
        """Buyers arrive until cancelled, or until `limit` came."""
        came = 0
        while self._limit is None or came < self._limit:
            came += 1
            buyer = asyncio.create_task(self._insist(session))
            self._buyers.add(buyer)
            buyer.add_done_callback(self._left)
            await asyncio.sleep(1 / self._rate)

    def _left(self, buyer: asyncio.Task[None]) -> None:
        self._buyers.discard(buyer)
        if not buyer.cancelled() and (error := buyer.exception()) is not None:
            self._failures.append(error)

    async def all_answered(self) -> None:
        """Return when every buyer who came has heard something definite."""
        deadline = time.monotonic() + ANSWERED_WITHIN
        while self._buyers:
            assert time.monotonic() < deadline, f"{len(self._buyers)} buyers without an answer: {self.troubles}"
            await asyncio.wait(self._buyers, timeout=0.5)
        if self._failures:
            raise self._failures[0]

    async def go_home(self) -> None:
        """Nobody waits any longer."""
        buyers = [*self._buyers]
        for buyer in buyers:
            buyer.cancel()
        await asyncio.gather(*buyers, return_exceptions=True)

    async def _insist(self, session: aiohttp.ClientSession) -> None:
        key = str(uuid.UUID(int=self._random.getrandbits(128)))
        body = {
            "item": self._random.choice(self.skus),
            "quantity": 1,
            "customer": f"c-{key}",
            "payment_token": self._random.choice(self._tokens),
        }
        headers = {"Authorization": "Bearer shop-secret", "Idempotency-Key": key}
        while True:
            try:
                async with session.post(f"{self.url}/v1/purchases", json=body, headers=headers) as reply:
                    answer = await reply.json(content_type=None)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self.troubles[type(error).__name__] += 1
            else:
                match reply.status:
                    case 200 | 202:
                        self.accepted[key] = answer["id"]
                        return
                    case 409:
                        self.refused[answer["type"].removeprefix("/problems/")] += 1
                        return
                    case 429 | 503:
                        self.troubles[str(reply.status)] += 1
                    case _:
                        raise AssertionError(f"{reply.status}: {answer}")
            await asyncio.sleep(ASK_AGAIN_AFTER)


@asynccontextmanager
async def crowd(
    url: str,
    skus: Sequence[str],
    *,
    rate: float = 40,
    tokens: Sequence[str] = ("tok_visa",),
    random: Random | None = None,
    limit: int | None = None,
) -> AsyncIterator[Crowd]:
    """Buyers come while the block runs (`limit` of them at most); on leaving, those who came wait for their answer."""
    buyers = Crowd(url, skus, rate=rate, tokens=tokens, random=random or Random(), limit=limit)
    timeout = aiohttp.ClientTimeout(total=ANSWER_WITHIN)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        coming = asyncio.create_task(buyers.come(session))
        try:
            yield buyers
            if limit is not None:
                await coming
            coming.cancel()
            await buyers.all_answered()
        finally:
            coming.cancel()
            await buyers.go_home()
            await asyncio.gather(coming, return_exceptions=True)
