"""`GET /v1/purchases/{id}` and `…/events`: how a purchase stands, to its owner.

Plain Starlette routes, as those of `producers.purchases`. What all who watch a purchase share is here too; see also
`producers.public_status`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from producers import problems
from producers.conditions import last_event, seen_by
from producers.events import EventStream
from producers.json_answer import JsonAnswer
from producers.parts import Parts
from producers.preferences import wait_seconds
from producers.problems import Problem
from producers.reading import Reading
from producers.shown import etag_of, purchase_json, watching_headers
from producers.waiting import for_change
from shared.purchases import PurchaseRecord

_PURCHASE_ID: Final = re.compile(r"[0-9a-f]{32}")

#: Who may see a purchase. Whoever may not is answered as if there were none.
MayWatch = Callable[[PurchaseRecord], bool]


async def show(request: Request) -> Response:
    """The purchase as it stands, to its owner; with `Prefer: wait=N`, as it stands after its next change."""
    parts: Parts = request.app.state.parts
    client = parts.authenticator.authenticate(request).name
    # Vary: somebody else's key must not find this answer in a cache they share.
    headers = {"Vary": "Authorization"}
    return await watched(request, lambda record: record.client == client, etag_of, purchase_json, headers)


async def events(request: Request) -> Response:
    """The purchase as events until it is final, to its owner."""
    parts: Parts = request.app.state.parts
    client = parts.authenticator.authenticate(request).name
    return await streamed(request, lambda record: record.client == client, "purchase", purchase_json)


async def watched(
    request: Request,
    may_watch: MayWatch,
    etag: Callable[[Reading], str],
    json: Callable[[Reading], bytes],
    headers: dict[str, str],
) -> Response:
    """The answer to a GET of a purchase: conditional (If-None-Match), and waiting for a change if asked to.

    Raises Problem (404) where there is none to be seen.
    """
    parts: Parts = request.app.state.parts
    seen = seen_by(request)
    reading = await _find(request, may_watch, seen.revision)
    seconds = wait_seconds(request.headers.getlist("Prefer"))
    if seconds is not None:
        headers["Preference-Applied"] = f"wait={seconds}"
        # Whoever has seen another state than this one is told at once.
        if not reading.record.final and not seen.misses(reading.record.rev):
            reading = await for_change(parts.hub, parts.reader, reading, seconds, request.receive)
    tag = etag(reading)
    headers |= watching_headers(reading, parts.reader.pace, tag)
    if seen.has(tag):
        return Response(status_code=304, headers=headers)
    return JsonAnswer(json(reading), 200, headers)


async def streamed(request: Request, may_watch: MayWatch, name: str, json: Callable[[Reading], bytes]) -> Response:
    """The answer to a GET of a purchase's events. Raises Problem (404) where there is none to be seen."""
    parts: Parts = request.app.state.parts
    revision = last_event(request)
    reading = await _find(request, may_watch, revision)
    if reading.record.final and revision >= reading.record.rev:
        # It knows how the purchase ended. This status tells a browser not to connect again.
        return Response(status_code=204, headers={"Cache-Control": "no-store"})
    return EventStream(parts.hub, parts.reader, reading, name, json)


async def _find(request: Request, may_watch: MayWatch, revision: int) -> Reading:
    parts: Parts = request.app.state.parts
    purchase_id: str = request.path_params["purchase_id"]
    reading = await parts.reader.read(purchase_id, revision) if _PURCHASE_ID.fullmatch(purchase_id) else None
    if reading is None or not may_watch(reading.record):
        raise Problem(problems.UNKNOWN_PURCHASE)
    return reading


show_route: Final = Route("/v1/purchases/{purchase_id}", show, methods=["GET"])
"""The one that a crowd asks for, again and again; see `producers.front`."""

routes: list[Any] = [
    show_route,
    Route("/v1/purchases/{purchase_id}/events", events, methods=["GET"]),
]
"""The routes, for `producers.app`."""
