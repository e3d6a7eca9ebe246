"""`GET /v1/purchases/{id}`: how a purchase stands, to its owner.

Plain Starlette routes, as those of `producers.purchases`.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from producers import problems
from producers.parts import Parts
from producers.problems import Problem
from producers.shown import ASK_AGAIN, etag_of, shown

_PURCHASE_ID = re.compile(r"[0-9a-f]{32}")


async def show(request: Request) -> Response:
    """The purchase as it stands, to its owner."""
    parts: Parts = request.app.state.parts
    client = parts.authenticator.authenticate(request).name
    purchase_id: str = request.path_params["purchase_id"]
    reading = await parts.reader.read(purchase_id) if _PURCHASE_ID.fullmatch(purchase_id) else None
    if reading is None or reading.record.client != client:
        raise Problem(problems.UNKNOWN_PURCHASE)
    etag = etag_of(reading)
    headers = {"ETag": etag}
    if not reading.record.final:
        headers["Retry-After"] = ASK_AGAIN
    if {etag, "*"} & {tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")}:
        return Response(status_code=304, headers=headers)
    return shown(reading, headers)


routes: list[Any] = [Route("/v1/purchases/{purchase_id}", show, methods=["GET"])]
"""The routes, for `producers.app`."""
