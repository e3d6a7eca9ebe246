"""A crowd that buys many small items, one after another, for as long as the mix goes on.

Items are small, so that each is soon sold out: the scarce end of a sale is where overselling would show. Buyers insist
with their keys until they hear something definite. Some ask again later with the same key, some watch their purchase
until it is final. Whatever they are told must still be true at the end.

Buyer and item number n are the same in every run of a seed. When one comes, and what is on sale then, depends on what
the faults do to the service.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from random import Random
from typing import Any

import aiohttp

from shared.states import FINAL

#: A request may take this long before its buyer asks again. Shorter than most faults, so that faults are felt.
ANSWER_WITHIN = 2.0
#: Pauses before asking again: the first, and the longest. They double, so that an outage leaves no stampede.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0
#: A status in Redis may be that old where Redis could not be written, or lost its last writes, when it was decided:
#: the longest fault of Redis or of a wire to it (6 s), until it is no longer fresh (2 s), and the request (2 s).
BEHIND = 10.0
#: Buyers who wait for an answer at once. More than that do not come: memory and sockets are bounded.
_MOST_WAITING = 300
#: Items on sale at once.
_ON_SALE = 4
#: Buyers per unit of stock that an item is offered to, the first and the second time of asking.
_CROWDED = 1.4
#: Payments that end well, and those of faults after which the truth can be found out.
_PAYS = (*["tok_visa"] * 30, *["tok_declined"] * 3)
_PAYS_IN_THE_END = (
    "tok_fault_silent_after_charge",
    "tok_fault_reset_after_charge",
    "tok_fault_hang_up_after_charge",
    "tok_fault_half_reply",
    "tok_fault_500_after_charge",
    "tok_fault_html_201",
    "tok_fault_slow",
    # Not charged at the first call, and nobody knows; charged at the second.
    "tok_fault_once_silent_before_charge",
    "tok_fault_once_500_before_charge",
    "tok_fault_once_reset_before_charge",
)
#: After this one the provider has never charged, and never will. Few: while nobody else pays any more, each keeps the
#: circuit breaker open for the others.
NEVER_CHARGED = ("tok_fault_500_before_charge",)
#: Payments in a hundred that go wrong in one of these ways.
_FAULTY = 5


@dataclass(slots=True)
class Offer:
    """An item on sale. `left` is how many buyers it is still to be offered to."""

    sku: str
    terms: dict[str, Any]
    restock: int
    left: int
    customers: int | None


@dataclass(frozen=True, slots=True)
class Told:
    """A final status, and when somebody was told it first (`time.monotonic`)."""

    status: str
    at: float


@dataclass(slots=True)
class Heard:
    """Everything that buyers were told. Purchases by key; `told` is the final status of a purchase by its id."""

    accepted: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    replayed: int = 0
    #: Answers with a state that a final one had followed already, no longer than `BEHIND` ago.
    behind: int = 0
    #: What must never be heard, in words.
    wrong: list[str] = field(default_factory=list)


class Buyers:
    """Buyers at `rate` a second at most. Whoever gets no answer from one of the API's addresses asks the next."""

    def __init__(self, urls: Sequence[str], seed: int, *, rate: float) -> None:
        self.heard = Heard()
        self.came = 0
        self._urls = cycle(urls)
        self._seed = seed
        self._rate = rate
        self._offers: list[Offer] = []
        self._items = 0
        self._waiting: set[asyncio.Task[None]] = set()
        self._watching: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Buyers:
        timeout = aiohttp.ClientTimeout(total=ANSWER_WITHIN)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._waiting, *self._watching]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert self._session is not None
        await self._session.close()

    @property
    def waiting(self) -> int:
        """How many buyers have not heard anything definite yet."""
        return len(self._waiting)

    async def come(self) -> None:
        """Buyers arrive until cancelled."""
        for _ in range(_ON_SALE):
            await self._offer_another()
        while True:
            await asyncio.sleep(1 / self._rate)
            if self._offers and len(self._waiting) < _MOST_WAITING:
                self.came += 1
                random = Random(f"{self._seed}/buyer/{self.came}")
                self._go(self._buy(self.came, self._take_offer(random), random), self._waiting)

    async def all_answered(self, within: float) -> None:
        """Return when everybody who came has heard something definite, or after so many seconds."""
        async with asyncio.timeout(within):
            while self._waiting:
                await asyncio.wait(self._waiting)

    def _go(self, what: Any, where: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(what)
        where.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            where.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self.heard.wrong.append(f"{type(error).__name__}: {error}")

        task.add_done_callback(ended)

    async def _offer_another(self) -> None:
        self._items += 1
        random = Random(f"{self._seed}/item/{self._items}")
        sku = f"item-{self._items}"
        stock = random.randint(8, 60)
        limit = random.choice([None, None, 2])
        terms = {"name": sku, "stock": stock, "price": 1200, "currency": "EUR", "waitlist": random.random() < 0.7}
        if limit is not None:
            terms["per_customer"] = limit
            self.heard.limits[sku] = limit
        offer = Offer(
            sku=sku,
            terms=terms,
            restock=random.choice([0, 0, 5, 15]),
            left=int(stock * _CROWDED) + 2,
            customers=None if limit is None else stock // 2 + 1,
        )
        await self._put(offer)
        self._offers.append(offer)

    async def _put(self, offer: Offer) -> None:
        headers = {"Authorization": "Bearer admin-secret"}
        status, body = await self._insist("PUT", f"/v1/items/{offer.sku}", headers, offer.terms)
        if status not in (200, 201):
            self.heard.wrong.append(f"PUT {offer.sku}: {status} {body}")

    async def _gone(self, offer: Offer) -> None:
        """Enough buyers came for it: more stock comes, or another item."""
        if offer.restock:
            offer.terms["stock"] += offer.restock
            await self._put(offer)
            offer.left = int(offer.restock * _CROWDED) + 2
            offer.restock = 0
            self._offers.append(offer)
        else:
            await self._offer_another()

    def _take_offer(self, random: Random) -> Offer:
        offer = self._offers[random.randrange(len(self._offers))]
        offer.left -= 1
        if offer.left <= 0:
            self._offers.remove(offer)
            self._go(self._gone(offer), self._watching)
        return offer

    async def _buy(self, number: int, offer: Offer, random: Random) -> None:
        key = f"{number}-{uuid.UUID(int=random.getrandbits(128))}"
        customer = f"c-{number}" if offer.customers is None else f"c-{offer.sku}-{random.randrange(offer.customers)}"
        body = {
            "item": offer.sku,
            "quantity": random.choice([1, 1, 1, 2]),
            "customer": customer,
            "payment_token": self._token(random),
        }
        self.heard.tokens[key] = str(body["payment_token"])
        headers = {"Authorization": "Bearer shop-secret", "Idempotency-Key": key}
        status, answer = await self._insist("POST", "/v1/purchases", headers, body)
        if status == 409:
            self.heard.refused[answer["type"].removeprefix("/problems/")] += 1
            return
        if status not in (200, 202):
            self.heard.wrong.append(f"POST {key}: {status} {answer}")
            return
        self.heard.accepted[key] = answer["id"]
        self._note_status(answer, None, time.monotonic())
        if random.random() < 0.3:
            self._go(self._watch(answer["id"], random), self._watching)
        if random.random() < 0.1:
            self._go(self._ask_again(key, body, headers, answer["id"], random), self._watching)

    @staticmethod
    def _token(random: Random) -> str:
        return random.choice((*_PAYS_IN_THE_END, *NEVER_CHARGED) if random.randrange(100) < _FAULTY else _PAYS)

    async def _ask_again(
        self, key: str, body: dict[str, Any], headers: dict[str, str], purchase: str, random: Random
    ) -> None:
        """The same key later gives the same purchase, whatever became of it and of its item."""
        await asyncio.sleep(random.uniform(0, 20))
        known, asked = self.heard.told.get(purchase), time.monotonic()
        status, answer = await self._insist("POST", "/v1/purchases", headers, body)
        if status not in (200, 202) or answer["id"] != purchase:
            self.heard.wrong.append(f"POST {key} again, not {purchase}: {status} {answer}")
        else:
            self.heard.replayed += 1
            self._note_status(answer, known, asked)

    async def _watch(self, purchase: str, random: Random) -> None:
        """Poll until it is final, and once more."""
        headers = {"Authorization": "Bearer shop-secret"}
        answer: dict[str, Any] = {}
        while answer.get("status") not in FINAL:
            await asyncio.sleep(random.uniform(0.3, 1.5))
            known, asked = self.heard.told.get(purchase), time.monotonic()
            status, answer = await self._insist("GET", f"/v1/purchases/{purchase}", headers)
            if status != 200:
                self.heard.wrong.append(f"GET {purchase}: {status} {answer}")
                return
            self._note_status(answer, known, asked)

    def _note_status(self, answer: dict[str, Any], known: Told | None, asked: float) -> None:
        """Final states never change, but an answer may be a while behind another one.

        `known` is what somebody was told before this was asked.
        """
        purchase, status = answer["id"], answer["status"]
        if known is not None and status != known.status:
            behind = asked - known.at
            if status in FINAL or behind > BEHIND:
                self.heard.wrong.append(f"{purchase} was told {known.status}, and asked {behind:.1f} s later {status}")
            else:
                self.heard.behind += 1
        if status in FINAL:
            self.heard.told.setdefault(purchase, Told(status, time.monotonic()))

    async def _insist(
        self, method: str, path: str, headers: dict[str, str], body: dict[str, Any] | None = None
    ) -> tuple[int, Any]:
        """Ask until something definite is heard: anything but an error of the connection, 429 and 503."""
        assert self._session is not None
        pause = _FIRST_PAUSE
        while True:
            try:
                async with self._session.request(method, next(self._urls) + path, json=body, headers=headers) as reply:
                    answer = await reply.json(content_type=None)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self.heard.troubles[type(error).__name__] += 1
            else:
                if reply.status not in (429, 503):
                    return reply.status, answer
                self.heard.troubles[str(reply.status)] += 1
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
