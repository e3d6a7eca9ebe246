"""Items over HTTP: an admin creates and changes them, any client may look at them."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Annotated, Any, Final

import structlog
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from redis import RedisError

from producers.auth import require_admin, require_key
from producers.conditions import seen_by
from producers.parts import Parts
from producers.problems import PRECONDITION_FAILED, STOCK_BELOW_COMMITTED, UNKNOWN_ITEM, Problem
from shared import doors, items
from shared.calling import lane_call
from shared.database import transaction
from shared.errors import ItemChangedError, StockBelowCommittedError
from shared.items import SKU_PATTERN, Item, ItemTerms

log = structlog.get_logger()

router = APIRouter(prefix="/v1/items", tags=["items"])

#: Items on one page: a screenful, unless more is asked for; so many at most that a page has some 100 KB.
_USUAL_PAGE, _LARGEST_PAGE = 50, 200

EXAMPLE: Final[dict[str, Any]] = {
    "sku": "sku-1",
    "name": "Ticket",
    "stock": 100,
    "available": 37,
    "held": 3,
    "sold": 60,
    "price": 4900,
    "currency": "EUR",
    "per_customer": 2,
    "opens_at": "2026-01-31T09:00:00.000000Z",
    "closes_at": "2026-01-31T21:00:00.000000Z",
    "hold_seconds": 900,
    "waitlist": True,
}
_ETAG: Final[dict[str, Any]] = {
    "description": "Changes with every change of the item, also when units are held or sold.",
    "schema": {"type": "string"},
}
_SHOWN: Final[dict[str, Any]] = {"application/json": {"example": EXAMPLE}}


def _whole_number(value: Any) -> Any:
    # A number in a query is text, and the framework would take 1_0 and 1.0 for numbers.
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) is None:
        raise ValueError("must be a whole number")
    return value


SkuInPath = Annotated[
    str,
    Path(
        pattern=SKU_PATTERN,
        description="The item's name: 1 to 64 of `A-Z a-z 0-9 . _ -`.",
        examples=["sku-1"],
    ),
]
IfNoneMatch = Annotated[
    str | None,
    Header(alias="If-None-Match", description="The ETag of an earlier answer.", examples=['"17"']),
]
IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match",
        description="Change the item only if it has this ETag, or one of these; never create it. For items at rest: "
        "while an item sells, its ETag changes with every unit.",
        examples=['"17"'],
    ),
]
Limit = Annotated[
    int,
    Field(ge=1, le=_LARGEST_PAGE),
    BeforeValidator(_whole_number),
    Query(description="The most items to answer with.", examples=[_USUAL_PAGE]),
]
After = Annotated[
    str | None,
    Query(
        pattern=SKU_PATTERN,
        description="Items after this name: `next` of the page before. It need not be an item's name.",
        examples=["sku-1"],
    ),
]


class Items(BaseModel):
    """A page of items, by name in byte order."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [EXAMPLE], "next": "sku-1"}]})

    items: list[Item]
    next: Annotated[str | None, Field(description="What to send as `after` for the next page; null on the last one.")]


@router.get(
    "",
    summary="List items",
    response_model=Items,
    response_description="A page of items as they stand now",
    responses={
        200: {
            "headers": {
                "Link": {
                    "description": 'The path of the next page, with `rel="next"`; not sent on the last one.',
                    "schema": {"type": "string"},
                }
            },
            "content": {"application/json": {"example": {"items": [EXAMPLE], "next": "sku-1"}}},
        }
    },
    dependencies=[Depends(require_key)],
)
async def list_items(request: Request, response: Response, limit: Limit = _USUAL_PAGE, after: After = None) -> Items:
    """By name in byte order. Whoever follows `next` sees every item that was there all the time exactly once."""
    parts: Parts = request.app.state.parts
    async with parts.engine.connect() as connection:
        page = await items.page(connection, after=after, limit=limit)
    if page.next is not None:
        # Names hold nothing that a URL would have to escape.
        response.headers["Link"] = f'</v1/items?limit={limit}&after={page.next}>; rel="next"'
    return Items(items=list(page.items), next=page.next)


@router.put(
    "/{sku}",
    summary="Create or change an item",
    status_code=200,
    response_model=Item,
    response_description="The item was changed",
    responses={
        200: {"headers": {"ETag": _ETAG}, "content": _SHOWN},
        201: {
            "model": Item,
            "description": "The item was created",
            "headers": {
                "Location": {"description": "The item's path", "schema": {"type": "string"}},
                "ETag": _ETAG,
            },
            "content": {
                "application/json": {"example": EXAMPLE | {"available": EXAMPLE["stock"], "held": 0, "sold": 0}}
            },
        },
    },
    dependencies=[Depends(require_admin)],
)
async def put_item(sku: SkuInPath, terms: ItemTerms, request: Request, response: Response, _: IfMatch = None) -> Item:
    """The terms replace the old ones as a whole: what is left out has its default again.

    A change of stock changes what is available by as much; what is held and sold stays. When stock rises, purchases on
    the waitlist are decided again. A purchase is judged by the opening hours that stand when it is decided, at the time
    when it was accepted; one that has stock keeps it, and may still be paid after the item closed.
    """
    parts: Parts = request.app.state.parts
    # All its lines; the declared parameter has one.
    given = request.headers.getlist("If-Match")
    expected = partial(_is_expected, ",".join(given)) if given else None
    try:
        async with transaction(parts.engine, parts.settings) as connection:
            saved = await items.save(connection, sku, terms, parts.settings, expected=expected)
    except StockBelowCommittedError as error:
        raise Problem(STOCK_BELOW_COMMITTED, f"{error}.") from error
    except ItemChangedError as error:
        raise Problem(PRECONDITION_FAILED) from error
    await _tell(parts, saved)
    if saved.created:
        response.status_code = 201
        response.headers["Location"] = f"/v1/items/{sku}"
    response.headers["ETag"] = _etag(saved.item.rev)
    return saved.item


@router.get(
    "/{sku}",
    summary="Look at an item",
    response_model=Item,
    response_description="The item as it stands now: `stock` = `available` + `held` + `sold`",
    responses={
        200: {"headers": {"ETag": _ETAG}, "content": _SHOWN},
        304: {
            "description": "Nothing changed since the answer whose ETag is in If-None-Match.",
            "headers": {"ETag": _ETAG},
        },
    },
    dependencies=[Depends(require_key)],
)
async def get_item(sku: SkuInPath, request: Request, response: Response, _: IfNoneMatch = None) -> Any:
    """Read from the database: exact at the moment of the answer."""
    parts: Parts = request.app.state.parts
    async with parts.engine.connect() as connection:
        item = await items.get(connection, sku)
    if item is None:
        raise Problem(UNKNOWN_ITEM, f"There is no item {sku}.")
    etag = _etag(item.rev)
    if seen_by(request).has(etag):
        return Response(status_code=304, headers={"ETag": etag})
    response.headers["ETag"] = etag
    return item


def _etag(rev: int) -> str:
    return f'"{rev}"'


def _is_expected(if_match: str, rev: int) -> bool:
    """Whether `If-Match` names this revision. Compared strongly (RFC 9110, 13.1.1): a weak ETag is none of ours. An
    ETag of ours holds no comma, so the list may be split at each."""
    return bool({_etag(rev), "*"} & {tag.strip() for tag in if_match.split(",")})


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
