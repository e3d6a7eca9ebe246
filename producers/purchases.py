"""`POST /v1/purchases`: the route by which every purchase comes in.

A plain Starlette route with msgspec: on the path of every request, FastAPI's own handling would cost half the rate.
What they take and give is described for `/docs` in `producers.purchases_described`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, assert_never

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from producers import problems
from producers.accept import Acceptance, Accepted, KeyReused, Order, UnknownItem
from producers.admit import Verdict
from producers.parts import Parts
from producers.problems import FieldError, Problem
from producers.reading import Reading
from producers.shown import ASK_AGAIN, shown
from shared.errors import QueueFullError
from shared.items import SKU_PATTERN

_VISIBLE = re.compile(r"[\x21-\x7e]{1,255}")
_SKU = re.compile(SKU_PATTERN)

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class PurchaseRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The body of POST /v1/purchases."""

    item: str
    quantity: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    customer: Text
    payment_token: Text

    def __repr__(self) -> str:
        return f"PurchaseRequest(item={self.item!r}, quantity={self.quantity})"


_decode = msgspec.json.Decoder(PurchaseRequest).decode


async def buy(request: Request) -> Response:
    """Accept a purchase, or answer for the one that its idempotency key stands for."""
    parts: Parts = request.app.state.parts
    client = parts.authenticator.authenticate(request).name
    key = idempotency_key(request)
    body = parse(await request.body())
    order = Order(client, key, body.item, body.quantity, body.customer, body.payment_token)
    verdict = await parts.admission.admit(client, key, order.item, order.quantity)
    if verdict not in (Verdict.KNOWN, Verdict.OPEN):
        # A key is looked up before it is refused: a retry never meets a refusal for a purchase that exists.
        known = await parts.acceptor.known(order)
        return _answer(known, order) if known is not None else _refuse(verdict, order)
    try:
        return _answer(await parts.acceptor.accept(order), order)
    except QueueFullError:
        # Also this is a refusal, and a retry must get its purchase all the same.
        known = await parts.acceptor.known(order)
        if known is None:
            raise
        return _answer(known, order)


def idempotency_key(request: Request) -> str:
    """The key of a request: 1 to 255 visible ASCII characters, bare or as a quoted string (both mean the same).

    Raises Problem `idempotency-key-missing`.
    """
    values = request.headers.getlist("Idempotency-Key")
    if len(values) != 1:
        detail = "The header Idempotency-Key is missing." if not values else "There is more than one Idempotency-Key."
        raise Problem(problems.IDEMPOTENCY_KEY_MISSING, detail=detail)
    key = values[0]
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = re.sub(r'\\(["\\])', r"\1", key[1:-1])
    if not _VISIBLE.fullmatch(key):
        raise Problem(
            problems.IDEMPOTENCY_KEY_MISSING, detail="Idempotency-Key must be 1 to 255 visible ASCII characters."
        )
    return key


def parse(body: bytes) -> PurchaseRequest:
    """The body of a purchase. Raises Problem `malformed`, naming the field at fault."""
    try:
        parsed = _decode(body)
    except msgspec.ValidationError as error:
        raise problems.malformed([_field_error(str(error))]) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise problems.malformed([FieldError("body", f"is not JSON: {str(error)[:300]}")]) from None
    if not _SKU.fullmatch(parsed.item):
        # Matched here and whole: in msgspec's search, `$` also matches before a newline at the end.
        raise problems.malformed([FieldError("item", f"does not match {SKU_PATTERN}")])
    for name in ("customer", "payment_token"):
        if not getattr(parsed, name).isprintable():
            raise problems.malformed([FieldError(name, "must consist of printable characters")])
    return parsed


def _field_error(message: str) -> FieldError:
    """msgspec says "Expected `int` - at `$.quantity`", or names a field in backquotes: take the field out of it."""
    what, _, path = message.partition(" - at ")
    if path:
        return FieldError(path.strip("`").removeprefix("$.") or "body", what)
    named = re.search(r"field `([^`]+)`", message)
    return FieldError(named[1][:100] if named else "body", what[:300])


def _answer(acceptance: Acceptance, order: Order) -> Response:
    match acceptance:
        case Accepted(record, replayed):
            headers = {"Location": f"/v1/purchases/{record.id}"}
            if replayed:
                headers["Idempotent-Replayed"] = "true"
            if not record.final:
                headers["Retry-After"] = ASK_AGAIN
            return shown(Reading(record, None), headers, status=200 if record.final else 202)
        case KeyReused():
            raise Problem(
                problems.IDEMPOTENCY_KEY_REUSED, detail="This Idempotency-Key was used with another body before."
            )
        case UnknownItem():
            raise Problem(problems.UNKNOWN_ITEM, detail=f"There is no item {order.item}.")
        case _:
            assert_never(acceptance)


def _refuse(verdict: Verdict, order: Order) -> Response:
    match verdict:
        case Verdict.UNKNOWN_ITEM:
            raise Problem(problems.UNKNOWN_ITEM, detail=f"There is no item {order.item}.")
        case Verdict.NOT_ON_SALE:
            raise Problem(problems.NOT_ON_SALE, detail=f"{order.item} is not on sale now.")
        case Verdict.SOLD_OUT:
            raise Problem(problems.SOLD_OUT, detail=f"There are not {order.quantity} of {order.item} left.")
        case Verdict.KNOWN | Verdict.OPEN:
            raise AssertionError(f"{verdict} is no refusal")
        case _:
            assert_never(verdict)


routes: list[Any] = [
    Route("/v1/purchases", buy, methods=["POST"]),
]
"""The routes, for `producers.app`."""
