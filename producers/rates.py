"""Rate limits at the door: token buckets of a client, of a customer, and of everybody together. Off until set.

Here is what the limits are and how a client is told of them. The buckets are in Redis and kept by its clock, in the
same call as the rest of admission (`shared/lua/admit.lua`), so all API processes share them.

What they count are requests, whatever becomes of them: each whose idempotency key is new to the door takes a token of
every limit before it is judged, and has used it if it is refused afterwards (unknown, not on sale, sold out, a full
queue). Who is refused by a limit takes no token of any. A key that the door knows takes none, and one that Postgres
knows is never refused.

The header fields are those of draft-ietf-httpapi-ratelimit-headers: `RateLimit-Policy` says what is allowed,
`RateLimit` what is left of it. The limit of everybody together is the operator's affair and is not shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil

from starlette.datastructures import MutableHeaders
from starlette.types import Scope

from shared import keys
from shared.settings import Settings


class Whose(StrEnum):
    """Whose requests a limit counts."""

    CLIENT = "client"  #: those with an API key of this name
    CUSTOMER = "customer"  #: those for one customer of one client
    ALL = "all"  #: every request at any API process


@dataclass(frozen=True, slots=True)
class Limit:
    """A token bucket: `rate` requests a second in the long run, and up to `burst` at once after a rest."""

    whose: Whose
    rate: float
    burst: int

    @property
    def interval(self) -> float:
        """Microseconds after which a token comes back."""
        return 1_000_000 / self.rate

    @property
    def window(self) -> int:
        """Seconds in which an empty bucket fills."""
        return max(1, ceil(self.burst / self.rate))

    def bucket(self, client: str, customer: str) -> str:
        """The key of the bucket that a request takes from."""
        match self.whose:
            case Whose.CLIENT:
                return keys.client_rate(client)
            case Whose.CUSTOMER:
                return keys.customer_rate(client, customer)
            case Whose.ALL:
                return keys.TOTAL_RATE


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a limit: tokens, and seconds until none is missing."""

    limit: Limit
    left: int
    full_in: float


def limits_of(settings: Settings) -> tuple[Limit, ...]:
    """The limits that are set, in the order in which they refuse."""
    named = (
        (Whose.CLIENT, settings.client_rate, settings.client_burst),
        (Whose.CUSTOMER, settings.customer_rate, settings.customer_burst),
        (Whose.ALL, settings.total_rate, settings.total_burst),
    )
    # Without a burst of its own, what comes in a second may come at once.
    return tuple(Limit(whose, rate, burst or max(1, ceil(rate))) for whose, rate, burst in named if rate is not None)


def policy_field(limits: Iterable[Limit]) -> str | None:
    """The value of `RateLimit-Policy`: a structured list. None if no limit is to be shown."""
    return ", ".join(f'"{a.whose}";q={a.burst};w={a.window}' for a in limits if a.whose is not Whose.ALL) or None


def allowance_field(allowances: Iterable[Allowance]) -> str | None:
    """The value of `RateLimit`: a structured list. None if no limit is to be shown."""
    shown = (allowance for allowance in allowances if allowance.limit.whose is not Whose.ALL)
    return ", ".join(f'"{a.limit.whose}";r={a.left};t={ceil(a.full_in)}' for a in shown) or None


def remember(scope: Scope, allowances: Sequence[Allowance]) -> None:
    """What the answer to this request will say of its limits, whatever becomes of it."""
    if allowances:
        scope.setdefault("state", {})["allowances"] = allowances


def add_fields(scope: Scope, headers: MutableHeaders) -> None:
    """Add the header fields to an answer of `POST /v1/purchases`, problems included.

    `RateLimit` is on those of which the door was asked (see `remember`): to others, such as a request without a key, no
    tokens belong.
    """
    policy: str | None = scope["app"].state.parts.admission.policy
    if policy is None:
        return
    headers["RateLimit-Policy"] = policy
    if field := allowance_field(scope.get("state", {}).get("allowances", ())):
        headers["RateLimit"] = field
