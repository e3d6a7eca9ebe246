"""`DELETE /v1/purchases/{id}`: a client calls its purchase off.

A plain Starlette route, as those of `producers.purchases`. What cancelling does is in `producers.cancel`.
"""

from __future__ import annotations

import re
from typing import Any, assert_never

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from producers import problems
from producers.cancel import Cancelled, TooLate, UnknownPurchase
from producers.parts import Parts
from producers.problems import Problem
from producers.reading import Reading
from producers.shown import etag_of, shown
from shared.states import Status

_PURCHASE_ID = re.compile(r"[0-9a-f]{32}")


async def cancel(request: Request) -> Response:
    """The purchase, cancelled now or before; or why it is not. No body is asked for; one of JSON is ignored."""
    parts: Parts = request.app.state.parts
    client = parts.authenticator.authenticate(request).name
    purchase_id: str = request.path_params["purchase_id"]
    if not _PURCHASE_ID.fullmatch(purchase_id):
        raise Problem(problems.UNKNOWN_PURCHASE)
    cancellation = await parts.canceller.cancel(client, purchase_id)
    match cancellation:
        case Cancelled(record):
            reading = Reading(record, None)
            return shown(reading, {"ETag": etag_of(reading)})
        case TooLate(record):
            held = record.status is Status.RESERVED
            detail = "It may have been charged once already." if held else f"The purchase is {record.status}."
            raise Problem(problems.TOO_LATE, detail)
        case UnknownPurchase():
            raise Problem(problems.UNKNOWN_PURCHASE)
        case _:
            assert_never(cancellation)


routes: list[Any] = [Route("/v1/purchases/{purchase_id}", cancel, methods=["DELETE"])]
"""The routes, for `producers.app`."""
