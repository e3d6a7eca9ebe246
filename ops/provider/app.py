"""The provider's HTTP side: the contract in `workers/gateways/__init__.py`, and pages for those who check the books."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Annotated, Any

import msgspec
from aiohttp import web

from ops.provider.faults import Fault, fault_for
from ops.provider.ledger import Charge, Ledger

#: Bytes a charge may have. The longest valid one is under 2 KiB.
MAX_BODY = 16 * 1024

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class ChargeBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /charges` takes. An amount of 0 is a free ticket."""

    reference: _Text
    amount: Annotated[int, msgspec.Meta(ge=0, le=10**12)]
    currency: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z]{3}\Z")]
    customer: _Text
    payment_token: _Text


class Outage(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /faults` takes: the status that every charge and every question gets, and for how long from now."""

    status: Annotated[int, msgspec.Meta(ge=400, le=599)]
    seconds: Annotated[float, msgspec.Meta(ge=0, le=3_600)]


class Provider:
    """The handlers. `latency` is in seconds: half of it passes before a charge is recorded, half after.

    So a caller who gives up in the middle may or may not have been charged, as with a real provider. A charge
    goes on when its caller hangs up.
    """

    def __init__(self, ledger: Ledger, *, latency: float) -> None:
        self._ledger = ledger
        self._pause = latency / 2
        self._posts: Counter[str] = Counter()
        self._outage = Outage(status=503, seconds=0)
        self._outage_ends = time.monotonic()
        self._refused = 0
        #: By charge id, when it may be found; and by reference, how often one was asked for too early.
        self._seen_from: dict[str, float] = {}
        self._asked_too_early: Counter[str] = Counter()
        self._in_flight = 0
        self._most_at_once = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_post("/charges", self.charge)
        app.router.add_get("/charges", self.find)
        app.router.add_get("/ledger", self.summary)
        app.router.add_get("/ledger/charges", self.all_charges)
        app.router.add_get("/ledger/posts", self.posts)
        app.router.add_post("/faults", self.begin_outage)
        app.router.add_get("/healthz", self.healthz)
        return app

    async def charge(self, request: web.Request) -> web.StreamResponse:
        """`POST /charges`: 201, 402, 422 (or 400, 413, 415 for what is no charge at all)."""
        if request.content_type != "application/json":
            return _problem(415, "send application/json")
        try:
            body = msgspec.json.decode(await request.read(), type=ChargeBody)
        except web.HTTPRequestEntityTooLarge:
            return _problem(413, f"a charge has at most {MAX_BODY} bytes")
        except msgspec.ValidationError as error:
            return _problem(422, str(error))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _problem(400, "the body is not JSON")
        self._posts[body.reference] += 1
        if (refusal := self._refusal()) is not None:
            return refusal
        self._in_flight += 1
        self._most_at_once = max(self._most_at_once, self._in_flight)
        try:
            return await self._settle(request, body)
        finally:
            self._in_flight -= 1

    async def _settle(self, request: web.Request, body: ChargeBody) -> web.StreamResponse:
        if body.payment_token.startswith("tok_invalid"):
            return _problem(422, "no such payment token")
        try:
            fault = fault_for(body.payment_token, self._posts[body.reference])
        except KeyError:
            return _problem(422, "no such fault")
        await self._wait()
        if fault is not None:
            return await self._fail(request, body, fault)
        reason = "card_declined" if body.payment_token.startswith("tok_declined") else None
        charge = self._record(request, body, reason)
        await self._wait()
        return _json(_public(charge), status=402 if reason else 201)

    async def _fail(self, request: web.Request, body: ChargeBody, fault: Fault) -> web.StreamResponse:
        reply: dict[str, object] = {"id": "ch_none", "reference": body.reference, "status": "succeeded"}
        for _ in range(fault.charges):
            charge = self._record(request, body, None)
            self._seen_from[charge.id] = time.monotonic() + fault.unseen
            reply = _public(charge)
        return await fault.answer(request, reply)

    def _refusal(self) -> web.Response | None:
        """What everybody is told during an outage."""
        if time.monotonic() >= self._outage_ends:
            return None
        self._refused += 1
        return _problem(self._outage.status, "an outage was asked for")

    async def begin_outage(self, request: web.Request) -> web.Response:
        """`POST /faults`: from now on everybody gets this status, for so long; 0 seconds end it."""
        try:
            self._outage = msgspec.json.decode(await request.read(), type=Outage)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _problem(422, str(error))
        self._outage_ends = time.monotonic() + self._outage.seconds
        return _json({"status": "ok"})

    def _record(self, request: web.Request, body: ChargeBody, reason: str | None) -> Charge:
        return self._ledger.record(
            reference=body.reference,
            amount=body.amount,
            currency=body.currency,
            customer=body.customer,
            reason=reason,
            idempotency_key=request.headers.get("Idempotency-Key"),
        )

    async def _wait(self) -> None:
        if self._pause > 0:
            await asyncio.sleep(self._pause)

    async def find(self, request: web.Request) -> web.Response:
        """`GET /charges?reference=`: `{"charges": [{"id", "status"}]}`, oldest first."""
        reference = request.query.get("reference")
        if not reference:
            return _problem(400, "name a reference")
        if (refusal := self._refusal()) is not None:
            return refusal
        known = self._ledger.find(reference)
        charges = [charge for charge in known if self._seen_from.get(charge.id, 0.0) <= time.monotonic()]
        self._asked_too_early[reference] += len(charges) < len(known)
        return _json({"charges": [{"id": charge.id, "status": charge.status} for charge in charges]})

    async def summary(self, request: web.Request) -> web.Response:
        """`GET /ledger`: counts of the whole ledger; of this process, POSTs taken, the most at once, and those refused
        (with the questions) in an outage."""
        charges = self._ledger.charges
        succeeded = sum(charge.status == "succeeded" for charge in charges)
        return _json(
            {
                "charges": len(charges),
                "succeeded": succeeded,
                "declined": len(charges) - succeeded,
                "charged_twice": sorted(self._ledger.charged_twice()),
                "posts": self._posts.total(),
                "most_at_once": self._most_at_once,
                "refused": self._refused,
            }
        )

    async def all_charges(self, request: web.Request) -> web.Response:
        """`GET /ledger/charges`: every charge, one JSON object a line, oldest first."""
        lines = msgspec.json.Encoder().encode_lines(self._ledger.charges)
        return web.Response(body=lines, content_type="application/x-ndjson")

    async def posts(self, request: web.Request) -> web.Response:
        """`GET /ledger/posts?reference=`: how many valid POSTs this process has taken for a reference, and how many
        questions it answered without a charge that it had made."""
        reference = request.query.get("reference", "")
        return _json({"posts": self._posts[reference], "asked_too_early": self._asked_too_early[reference]})

    async def healthz(self, request: web.Request) -> web.Response:
        return _json({"status": "ok"})


def _public(charge: Charge) -> dict[str, object]:
    shown: dict[str, object] = {
        "id": charge.id,
        "reference": charge.reference,
        "status": charge.status,
    }
    if charge.reason is not None:
        shown["reason"] = charge.reason
    return shown


def _problem(status: int, error: str) -> web.Response:
    return _json({"error": error}, status=status)


def _json(content: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")
