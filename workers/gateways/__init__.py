"""Gateways: how Fairlane asks a payment provider to charge, and how it reads the answer.

A gateway turns one call into one of four outcomes (`outcomes.py`). The rule behind all of them: **a charge
that may have been executed is never reported as not sent.** `NotSent` needs proof, and the only proof is that
no byte of the request's body was given to a socket (or that the provider said, with a status that means it,
that it did nothing). Everything that cannot be proved either way is `InDoubt`, and is settled later by asking
the provider.

    charge ──▶ wait for a connection ──▶ connect ──▶ [last check: start_by] ──▶ body written ──▶ answer read
               └──────────── an error here is NotSent ─────────────┘           └── an error here is InDoubt
               ──┘

The provider's contract, as `HttpGateway` speaks it. A charge is

    POST <FAIRLANE_PAYMENT_URL>/charges     Idempotency-Key: <reference>
    {"reference", "amount", "currency", "customer", "payment_token"}

`reference` is the purchase's id, `amount` is in the currency's minor unit. The provider is taken to make a new charge
of every POST, the header notwithstanding; a gateway to one that does not says so in its `Capabilities`.

    what comes back                             what it means
    ─────────────────────────────────────────   ──────────────────────────────────────────────────────────
    201 {"id", "reference", "status":           charged: `Confirmed`
         "succeeded"}
    402 {"status": "declined", "reason"}        refused, not charged: `Declined`, with the provider's reason
    400, 422                                    not charged: `Declined`, reason `provider_rejected`
    401, 403, 404                               not charged: `NotSent`, and an operator must act (`alert`)
    429                                         not charged: `NotSent`, later (`Retry-After`)
    no connection: refused, DNS, TLS, too late  nothing was written: `NotSent`
    all else: a timeout, a reset, half a        not known: `InDoubt`
    reply, 3xx, 5xx, any other 2xx, a 201 or
    402 that cannot be read

To find out later, it is asked for every charge of a reference. An empty list says that there is none; anything but a
200 of this shape is no answer (`GatewayUnavailable`), never an empty list:

    GET <FAIRLANE_PAYMENT_URL>/charges?reference=<reference>
    200 {"charges": [{"id", "status": "succeeded" | "declined"}]}

Other providers come by the entry point group `fairlane.gateways` (`loading.py`).
"""

from __future__ import annotations

from workers.gateways.http import HttpGateway
from workers.gateways.loading import ENTRY_POINT_GROUP, GatewayFactory, load_gateway
from workers.gateways.outcomes import (
    Capabilities,
    ChargeOutcome,
    ChargeRecord,
    ChargeRequest,
    Confirmed,
    Declined,
    Gateway,
    GatewayUnavailable,
    InDoubt,
    NotSent,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "Capabilities",
    "ChargeOutcome",
    "ChargeRecord",
    "ChargeRequest",
    "Confirmed",
    "Declined",
    "Gateway",
    "GatewayFactory",
    "GatewayUnavailable",
    "HttpGateway",
    "InDoubt",
    "NotSent",
    "load_gateway",
]
