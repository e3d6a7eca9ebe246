"""What a payment call can come to, as data, and the protocol every gateway keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from shared.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The provider charged the customer."""

    charge_id: str  #: The provider's id of the charge: 1-255 visible ASCII characters.


@dataclass(frozen=True, slots=True)
class Declined:
    """The provider refused, and charged nothing. Asking again would not help."""

    #: The provider's reason, at most 100 printable characters, or `declined`, `provider_rejected`.
    reason: str
    charge_id: str | None = None  #: The provider's id of the refused charge, if it gave one.


@dataclass(frozen=True, slots=True)
class NotSent:
    """The charge was provably not executed: the purchase goes back to `reserved` and may be tried again."""

    reason: str  #: A short fixed word, fit for a metric's label.
    alert: bool = False  #: True when no retry will help until an operator acts: opens the circuit breaker.
    retry_after: float | None = None  #: Seconds the provider asked us to wait, if it did.


@dataclass(frozen=True, slots=True)
class InDoubt:
    """The charge may or may not have been executed. It must not be repeated; ask `find` later."""

    reason: str  #: A short fixed word, fit for a metric's label.


ChargeOutcome = Confirmed | Declined | NotSent | InDoubt


@dataclass(frozen=True, slots=True)
class ChargeRequest:
    """One charge to be made."""

    reference: str  #: The purchase's id. The provider stores it, and `find` asks for it.
    amount: int  #: In the currency's minor unit.
    currency: str  #: ISO 4217, such as `EUR`.
    customer: str
    payment_token: str = field(repr=False)  #: A secret: never logged, never in an outcome.


@dataclass(frozen=True, slots=True)
class ChargeRecord:
    """One charge the provider has on its books."""

    id: str
    status: str  #: `succeeded`, `declined`, or a word of the provider's that means neither (yet).


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a provider can do for us."""

    deduplicates: bool  #: It honours `Idempotency-Key`: a repeated call makes no second charge.
    can_find: bool  #: It can be asked for the charges of a reference.
    #: Its calls have no short deadline and may outlast `CHARGE_LOCK_TTL`: the narrow lock is renewed while one runs.
    #: Its purchase becomes in doubt meanwhile, but nobody asks about it before the call is over.
    long_calls: bool = False


class GatewayUnavailable(UnavailableError):
    """The payment provider gave no trustworthy answer."""


class Gateway(Protocol):
    """One payment provider. An instance belongs to one event loop."""

    @property
    def capabilities(self) -> Capabilities:
        """What this provider can do. Does not change while the gateway lives."""

    async def charge(self, request: ChargeRequest, *, start_by: float) -> ChargeOutcome:
        """Make one charge, with at most one request.

        `start_by` is on the scale of `time.monotonic()`, in seconds. Past it nothing is sent, whatever was
        waited for in between. Raises nothing but `asyncio.CancelledError`; after that the caller must take
        the charge for in doubt, and nothing more will be sent for it.
        """

    async def find(self, reference: str) -> list[ChargeRecord]:
        """All charges of this reference, in the provider's order; empty when there is none.

        Raises `GatewayUnavailable` when there is no answer that can be trusted. An empty list is a statement.
        """

    async def close(self) -> None:
        """Close all connections. Later charges are `NotSent`. May be called twice."""
