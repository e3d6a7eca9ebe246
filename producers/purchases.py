"""`POST /v1/purchases`: the route by which every purchase comes in.

A plain Starlette route with msgspec: on the path of every request, FastAPI's own handling would cost half the rate.
What they take and give is described for `/docs` in `producers.purchases_described`.
"""

from __future__ import annotations

import re
from math import ceil
from typing import Annotated, Any, Final, assert_never

import msgspec
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from producers import admit, problems, rates
from producers.accept import Acceptance, Accepted, KeyReused, Order, UnknownItem
from producers.admit import Ruling, Verdict
from producers.fields import Fields
from producers.limits import whole_body
from producers.pace import Pace
from producers.parts import Parts
from producers.problems import FieldError, Problem
from producers.reading import Reading
from producers.shown import ask_again, shown
from shared.errors import QueueFullError, UnavailableError
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
    body = parse(await whole_body(request.receive))
    order = Order(client, key, body.item, body.quantity, body.customer, body.payment_token)
    knock = admit.Request(client, key, body.item, body.quantity, body.customer)
    try:
        ruling = await parts.admission.admit(knock)
    except QueueFullError:
        return await _known_or_full(parts, order)
    rates.remember(request.scope, ruling.allowances)
    if not ruling.lets_in:
        # A key is looked up before it is refused: a retry never meets a refusal for a purchase that exists.
        known = await parts.acceptor.known(order)
        return _answer(known, order, parts.reader.pace) if known is not None else _refuse(ruling, order)
    try:
        acceptance = await parts.acceptor.accept(order)
    except QueueFullError:
        await parts.admission.give_back(knock, forget=True)
        return await _known_or_full(parts, order)
    except UnavailableError:
        raise  # It may be recorded, so its units may wait.
    except Exception:
        await parts.admission.give_back(knock, forget=True)
        raise
    match acceptance:
        case UnknownItem():
            await parts.admission.give_back(knock, forget=True)
        case KeyReused() | Accepted(replayed=True):
            await parts.admission.give_back(knock, forget=False)
    return _answer(acceptance, order, parts.reader.pace)


async def _known_or_full(parts: Parts, order: Order) -> Response:
    """Also this is a refusal, and a retry must get its purchase all the same."""
    known = await parts.acceptor.known(order)
    if known is None:
        raise QueueFullError
    return _answer(known, order, parts.reader.pace)


def idempotency_key(request: Request) -> str:
    """The key of a request: 1 to 255 visible ASCII characters, bare or as a quoted string (both mean the same).

    Raises Problem `idempotency-key-missing`.
    """
    values: list[bytes] = [value for name, value in request.scope["headers"] if name == b"idempotency-key"]
    if len(values) != 1:
        detail = "The header Idempotency-Key is missing." if not values else "There is more than one Idempotency-Key."
        raise Problem(problems.IDEMPOTENCY_KEY_MISSING, detail=detail)
    key = values[0].decode("latin-1")
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


def _answer(acceptance: Acceptance, order: Order, pace: Pace) -> Response:
    match acceptance:
        case Accepted(record, replayed):
            headers = {"Location": f"/v1/purchases/{record.id}"}
            if replayed:
                headers["Idempotent-Replayed"] = "true"
            reading = Reading(record, None)
            if not record.final:
                headers["Retry-After"] = ask_again(reading, pace)
            return shown(reading, headers, status=200 if record.final else 202)
        case KeyReused():
            raise Problem(
                problems.IDEMPOTENCY_KEY_REUSED, detail="This Idempotency-Key was used with another body before."
            )
        case UnknownItem():
            raise Problem(problems.UNKNOWN_ITEM, detail=f"There is no item {order.item}.")
        case _:
            assert_never(acceptance)


def _refuse(ruling: Ruling, order: Order) -> Response:
    # Not raised: of a crowd, nearly all are told so.
    return problems.response(_refusal(ruling, order))


def _refusal(ruling: Ruling, order: Order) -> Problem:
    match ruling.verdict:
        case Verdict.SOLD_OUT:
            return Problem(problems.SOLD_OUT, detail=f"There are not {order.quantity} of {order.item} left.")
        case Verdict.QUEUE_FULL:
            detail = f"Those who wait for {order.item} already want all that is left of it."
            return Problem(problems.QUEUE_FULL, detail=detail, retry_after=_seconds(ruling))
        case Verdict.UNKNOWN_ITEM:
            return Problem(problems.UNKNOWN_ITEM, detail=f"There is no item {order.item}.")
        case Verdict.NOT_ON_SALE:
            return Problem(problems.NOT_ON_SALE, detail=f"{order.item} is not on sale now.")
        case Verdict.CLIENT_RATE:
            detail = "This client sends more requests to buy than are allowed."
            return Problem(problems.RATE_LIMITED, detail=detail, retry_after=_seconds(ruling))
        case Verdict.CUSTOMER_RATE:
            detail = "There are more requests to buy for this customer than are allowed."
            return Problem(problems.RATE_LIMITED, detail=detail, retry_after=_seconds(ruling))
        case Verdict.TOTAL_RATE:
            detail = "All clients together send more requests to buy than are taken."
            return Problem(problems.QUEUE_FULL, detail=detail, retry_after=_seconds(ruling))
        case Verdict.KNOWN | Verdict.OPEN | Verdict.NOT_COUNTED:
            raise AssertionError(f"{ruling.verdict} is no refusal")
        case _:
            assert_never(ruling.verdict)


def _seconds(ruling: Ruling) -> int:
    return max(1, ceil(ruling.wait))


buy_route: Final = Route("/v1/purchases", buy, methods=["POST"], middleware=[Middleware(Fields, add=rates.add_fields)])
"""The one that a crowd asks for; see `producers.front`."""

routes: list[Any] = [buy_route]
"""The routes, for `producers.app`."""
