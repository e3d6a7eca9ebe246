"""Gateways: how Fairlane asks a payment provider to charge, and how it reads the answer.

A gateway turns one call into one of four outcomes (`outcomes.py`). The rule behind all of them: **a charge
that may have been executed is never reported as not sent.** `NotSent` needs proof, and the only proof is that
no byte of the request's body was given to a socket (or that the provider said, with a status that means it,
that it did nothing). Everything that cannot be proved either way is `InDoubt`, and is settled later by asking
the provider.

    charge ──▶ wait for a connection ──▶ connect ──▶ [last check: start_by] ──▶ body written ──▶ answer read
               └──────────── an error here is NotSent ─────────────┘           └── an error here is InDoubt
               ──┘

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
