"""Items over HTTP: an admin creates and changes them, any client may look at them."""

from __future__ import annotations

import asyncio
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Path, Request, Response
from redis import RedisError

from producers.auth import require_admin, require_key
from producers.parts import Parts
from producers.problems import STOCK_BELOW_COMMITTED, UNKNOWN_ITEM, Problem
from shared import doors, items
from shared.calling import lane_call
from shared.database import transaction
from shared.errors import StockBelowCommittedError
from shared.items import SKU_PATTERN, Item, ItemTerms

log = structlog.get_logger()

router = APIRouter(prefix="/v1/items", tags=["items"])

SkuInPath = Annotated[
    str,
    Path(
        pattern=SKU_PATTERN,
        description="The item's name: 1 to 64 of `A-Z a-z 0-9 . _ -`.",
        examples=["sku-1"],
    ),
]


@router.put(
    "/{sku}",
    summary="Create or change an item",
    status_code=200,
    response_model=Item,
    response_description="The item was changed",
    responses={
        201: {
            "model": Item,
            "description": "The item was created",
            "headers": {"Location": {"description": "The item's path", "schema": {"type": "string"}}},
        }
    },
    dependencies=[Depends(require_admin)],
)
async def put_item(sku: SkuInPath, terms: ItemTerms, request: Request, response: Response) -> Item:
    """The terms replace the old ones as a whole: what is left out has its default again.

    A change of stock changes what is available by as much; what is held and sold stays. When stock rises, purchases on
    the waitlist are decided again.
    """
    parts: Parts = request.app.state.parts
    try:
        async with transaction(parts.engine, parts.settings) as connection:
            saved = await items.save(connection, sku, terms, parts.settings)
    except StockBelowCommittedError as error:
        raise Problem(STOCK_BELOW_COMMITTED, f"{error}.") from error
    await _tell(parts, saved)
    if saved.created:
        response.status_code = 201
        response.headers["Location"] = f"/v1/items/{sku}"
    return saved.item


@router.get(
    "/{sku}",
    summary="Look at an item",
    response_model=Item,
    response_description="The item as it stands now: `stock` = `available` + `held` + `sold`",
    dependencies=[Depends(require_key)],
)
async def get_item(sku: SkuInPath, request: Request) -> Item:
    """Read from the database: exact at the moment of the answer."""
    parts: Parts = request.app.state.parts
    async with parts.engine.connect() as connection:
        item = await items.get(connection, sku)
    if item is None:
        raise Problem(UNKNOWN_ITEM, f"There is no item {sku}.")
    return item


async def _tell(parts: Parts, saved: items.Saved) -> None:
    """After the commit: the door learns the new terms, and the lane looks at its waitlist.

    The item is saved whatever happens here, so a failure is only logged: door records expire within seconds, and the
    sweep calls lanes that have work.
    """
    try:
        async with parts.redis.pipeline(transaction=False) as pipe:
            doors.queue_write(pipe, [saved.door], parts.settings)
            await pipe.execute()
    except RedisError as error:
        log.warning("door_not_written", sku=saved.item.sku, error=str(error))
    if not saved.created:
        # Also when stock did not rise: a waitlist that was turned off, or a smaller stock, settles who waits. A call
        # that finds nothing costs one short transaction. Publishing blocks, so it happens in a thread.
        await asyncio.to_thread(parts.caller.call, [lane_call(saved.lane)])
