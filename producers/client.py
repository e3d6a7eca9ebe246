"""A client of the HTTP API: buys with a key that survives every retry, and waits for the result.

    async with Client("http://127.0.0.1:8000", api_key="shop-secret") as fairlane:
        purchase = await fairlane.buy("sku-1", customer="c-42", payment_token="tok_visa")
        purchase = await fairlane.result(purchase.id)
        print(purchase.status)                                  # confirmed, declined, sold_out, …

A request is repeated while nobody can tell what became of it, or the service asks to come again: no connection, no
answer in time, 408, 429, 500, 502, 503, 504. That is safe, as the idempotency key says which purchase is meant. What
`buy` raises has that key: whoever buys with it again gets the same purchase, if there is one.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Final, Self

import aiohttp
import msgspec

from shared.errors import FairlaneError
from shared.states import FINAL

#: Seconds for one request without a wait: a commit takes milliseconds, and a second or two in the worst crowd.
_REQUEST_WITHIN: Final = 10.0
#: Pauses before a repetition, in seconds, when the service names none: doubled from the first to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
#: Of a pause, the part that is left to chance, so that those who were refused together do not return together.
_JITTER: Final = 0.25
_PROBLEMS: Final = "/problems/"
#: The longest wait that the service grants in one request, in seconds.
_LONGEST_WAIT: Final = 30
_ASK_AGAIN: Final = frozenset({408, 429, 500, 502, 503, 504})
#: Refusals that say nothing of the purchase: a request before, whose answer was lost, may have been taken.
_OF_THE_KEY: Final = frozenset({401, 403})
#: What will not be better the next time.
_HOPELESS: Final = (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError)


class Purchase(msgspec.Struct, frozen=True):
    """A purchase as the API shows it; times RFC 3339 in UTC, amounts in minor units."""

    id: str
    status: str
    reason: str | None
    item: str
    quantity: int
    customer: str
    amount: int
    currency: str
    charge_id: str | None
    position: int | None
    accepted_at: str
    decided_at: str | None
    finished_at: str | None

    @property
    def final(self) -> bool:
        """Whether its status never changes again."""
        return self.status in FINAL

    @property
    def confirmed(self) -> bool:
        """Whether it is paid for, and the units are the customer's."""
        return self.status == "confirmed"


@dataclass(frozen=True, slots=True)
class Bought:
    """The purchase that an idempotency key stands for; `replayed` if an earlier request made it."""

    purchase: Purchase
    key: str
    replayed: bool

    @property
    def id(self) -> str:
        """The id of the purchase."""
        return self.purchase.id


class RefusedError(FairlaneError):
    """The service said no, and would say so again: `slug` is the kind of problem, as in `/problems/<slug>`.

    `key` is the idempotency key if it was about buying: nothing was bought.
    """

    def __init__(self, status: int, slug: str, detail: str, key: str | None = None) -> None:
        super().__init__(f"{slug}: {detail}")
        self.status = status
        self.slug = slug
        self.detail = detail
        self.key = key


class UnansweredError(FairlaneError):
    """Nothing definite was heard. To buy again with `key` gets the purchase that may exist."""

    def __init__(self, trouble: str, key: str | None = None) -> None:
        super().__init__(f"no definite answer: {trouble}")
        self.trouble = trouble
        self.key = key


@dataclass(frozen=True, slots=True)
class _Answer:
    """A definite answer. `purchase` is None where the service says that nothing changed (304)."""

    status: int
    headers: Mapping[str, str]
    purchase: Purchase | None


class Client:
    """One shop's connection to the API. `patience`: seconds for which a request is repeated.

    `on_trouble` hears of every repetition: the name of an error, or a status. A `session` that is given is used and
    stays open; its connections bound how many requests are under way. Raises ValueError for what is no URL.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        patience: float = 60.0,
        session: aiohttp.ClientSession | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
            raise ValueError(f"{url[:100]!r} is not a URL like http://127.0.0.1:8000")
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._patience = patience
        self._given = session is not None
        self._session = session
        self._on_trouble = on_trouble

    async def __aenter__(self) -> Self:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None and not self._given:
            await self._session.close()
            self._session = None

    async def buy(
        self, item: str, *, customer: str, payment_token: str, quantity: int = 1, key: str | None = None
    ) -> Bought:
        """Buy, once, however often the request has to be sent: a new key unless one is given.

        Raises RefusedError (`sold-out`, `not-on-sale`, `malformed`, …) and UnansweredError; both have the key.
        """
        key = key or uuid.uuid4().hex
        order = {"item": item, "quantity": quantity, "customer": customer, "payment_token": payment_token}
        try:
            answer = await self._ask("POST", "/v1/purchases", {"Idempotency-Key": key}, order)
        except RefusedError as error:
            raise RefusedError(error.status, error.slug, error.detail, key) from None
        except UnansweredError as error:
            raise UnansweredError(error.trouble, key) from None
        return Bought(_shown(answer), key, replayed=answer.headers.get("Idempotent-Replayed") == "true")

    async def get(self, purchase_id: str) -> Purchase:
        """The purchase as it stands. Raises RefusedError (`unknown-purchase`), UnansweredError."""
        return _shown(await self._ask("GET", f"/v1/purchases/{purchase_id}"))

    async def result(self, purchase_id: str, *, within: float = 60.0, wait: int = 20) -> Purchase:
        """The purchase when it is final, or as it stands after `within` seconds (and a request that is under way).

        `wait` is for how many seconds the service holds a request until something changes; with 0 it is asked again as
        often as it says. Raises RefusedError (`unknown-purchase`), and UnansweredError when it never answered.
        """
        deadline = time.monotonic() + within
        headers: dict[str, str] = {}
        purchase: Purchase | None = None
        while True:
            hold = max(0, min(wait, _LONGEST_WAIT, int(deadline - time.monotonic())))
            if hold:
                headers["Prefer"] = f"wait={hold}"
            else:
                headers.pop("Prefer", None)
            try:
                answer = await self._ask("GET", f"/v1/purchases/{purchase_id}", headers, hold=hold, deadline=deadline)
            except UnansweredError:
                if purchase is None:
                    raise
                return purchase
            purchase = _shown(answer) if purchase is None else answer.purchase or purchase
            left = deadline - time.monotonic()
            if purchase.final or left <= 0:
                return purchase
            if "ETag" in answer.headers:
                # Also keeps answers in order: never an older state than the one that was seen.
                headers["If-None-Match"] = answer.headers["ETag"]
            if "Preference-Applied" not in answer.headers:
                await asyncio.sleep(min(left, _jittered(_retry_after(answer.headers) or _FIRST_PAUSE)))

    async def cancel(self, purchase_id: str) -> Purchase:
        """Call it off. Raises RefusedError (`too-late`, `unknown-purchase`), UnansweredError."""
        return _shown(await self._ask("DELETE", f"/v1/purchases/{purchase_id}"))

    async def _ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        *,
        hold: float = 0.0,
        deadline: float | None = None,
    ) -> _Answer:
        """Ask, at least once, until something definite is heard or patience is at its end."""
        if deadline is None:
            deadline = time.monotonic() + self._patience
        pause = _FIRST_PAUSE
        lost = False
        while True:
            named: float | None = None
            try:
                answer = await self._ask_once(method, path, headers or {}, json, hold)
            except _HOPELESS as error:
                raise UnansweredError(type(error).__name__) from None
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                trouble = type(error).__name__
            except RefusedError as refused:
                if lost and refused.status in _OF_THE_KEY:
                    raise UnansweredError(str(refused)) from None
                raise
            else:
                if isinstance(answer, _Answer):
                    return answer
                trouble, named = str(answer.status), _retry_after(answer.headers)
            lost = True
            self._on_trouble(trouble)
            rest = _jittered(pause if named is None else max(named, _FIRST_PAUSE))
            if time.monotonic() + rest >= deadline:
                raise UnansweredError(trouble)
            await asyncio.sleep(rest)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _ask_once(
        self, method: str, path: str, headers: Mapping[str, str], json: Any, hold: float
    ) -> _Answer | aiohttp.ClientResponse:
        """A definite answer, or one to ask again after. Raises RefusedError, UnansweredError, and what aiohttp does."""
        if self._session is None:
            raise RuntimeError("the client is not open: use it with `async with`")
        async with self._session.request(
            method,
            self._url + path,
            json=json,
            headers={**self._headers, **headers},
            timeout=aiohttp.ClientTimeout(total=_REQUEST_WITHIN + hold),
            allow_redirects=False,  # the service never redirects; whoever does must not get the payment token
        ) as response:
            body = await response.read()
        if response.status in _ASK_AGAIN:
            return response
        if response.status == 304:
            return _Answer(response.status, response.headers, None)
        try:
            if response.status in (200, 202):
                return _Answer(response.status, response.headers, msgspec.json.decode(body, type=Purchase))
            problem = msgspec.json.decode(body, type=_Problem)
        except msgspec.DecodeError:
            raise UnansweredError(f"{response.status} with something else than this API answers") from None
        raise RefusedError(response.status, problem.type.removeprefix(_PROBLEMS), problem.detail)


class _Problem(msgspec.Struct, frozen=True):
    """What is looked at of an error."""

    type: Annotated[str, msgspec.Meta(pattern=f"^{_PROBLEMS}")]
    detail: str


def _shown(answer: _Answer) -> Purchase:
    if answer.purchase is None:
        raise UnansweredError("304 without having been asked for it")
    return answer.purchase


def _retry_after(headers: Mapping[str, str]) -> float | None:
    text = headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else None


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(1 - _JITTER, 1 + _JITTER)
