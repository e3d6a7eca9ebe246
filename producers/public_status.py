"""`GET /v1/status/{id}` and `…/events`: how a purchase stands, without an API key, for the buyer's browser.

The id is the capability: its 74 random bits are known to the shop and its buyer only. Nothing of the purchase is shown
but where it stands. Scripts of other origins may read the answers where `producers.cors` lets them.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from producers.parts import Parts
from producers.reading import Reading
from producers.shown import estimated_seconds, etag_of
from producers.watching import streamed, watched
from shared.purchases import PurchaseRecord


class StatusAnswer(msgspec.Struct, frozen=True):
    """Where a purchase stands. `position` and `estimated_seconds` (until it is decided) only while it is queued."""

    status: str
    reason: str | None
    position: int | None
    estimated_seconds: int | None


_encode = msgspec.json.Encoder().encode


async def show(request: Request) -> Response:
    """Where the purchase stands; with `Prefer: wait=N`, after its next change."""
    return await watched(request, _anybody, _weak_etag_of, lambda reading: _json(request, reading), {})


async def events(request: Request) -> Response:
    """Where the purchase stands, as events until it is final."""
    return await streamed(request, _anybody, "status", lambda reading: _json(request, reading))


def _anybody(record: PurchaseRecord) -> bool:
    return True


def _weak_etag_of(reading: Reading) -> str:
    """Weak, as the estimate may be another at any moment and is not worth an answer of its own."""
    return f"W/{etag_of(reading)}"


def _json(request: Request, reading: Reading) -> bytes:
    parts: Parts = request.app.state.parts
    record = reading.record
    estimate = estimated_seconds(reading, parts.reader.pace)
    return _encode(StatusAnswer(record.status.value, record.reason, reading.position, estimate))


show_route: Final = Route("/v1/status/{purchase_id}", show, methods=["GET"])
"""The one that a crowd asks for, again and again; see `producers.front`."""

routes: list[Any] = [
    show_route,
    Route("/v1/status/{purchase_id}/events", events, methods=["GET"]),
]
"""The routes, for `producers.app`."""
