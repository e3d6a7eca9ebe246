"""The ways a provider can fail a caller, by name: `tok_fault_<name>` as the payment token asks for one.

`tok_fault_once_<name>` asks for it at the first POST of a reference only; later ones are answered well.

Each fault says how many charges are made before things go wrong. The caller cannot see it; the ledger can.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from aiohttp import web

PREFIX = "tok_fault_"
ONCE = "once_"

#: Seconds between two looks at whether a caller kept waiting in silence has gone. Nobody waits for the
#: result.
HANG_UP_CHECK = 0.05

#: Seconds a `slow` reply takes longer than usual: longer than a person waits, shorter than any sensible call
#: timeout.
SLOW = 3.0

#: Seconds in which a charge that is shown late cannot be found: longer than a caller waits with its first
#: question, shorter than any sensible settle window.
UNSEEN = 3.0

Answer = Callable[[web.Request, dict[str, object]], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens instead of a good reply. `answer` is given the reply a good provider would have sent.

    `charges` are made before that, and are found by their reference `unseen` seconds later.
    """

    charges: int
    answer: Answer
    unseen: float = 0.0


async def _silence(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
    """Say nothing until the caller hangs up."""
    # No event tells a handler that its caller has gone, so it looks.
    while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110
        await asyncio.sleep(HANG_UP_CHECK)
    return web.Response()


async def _slow(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
    await asyncio.sleep(SLOW)
    return web.json_response(reply, status=201)


async def _reset(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
    """Break the connection with a TCP reset."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()


async def _hang_up(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
    """End the connection in good order, without a word."""
    if request.transport is not None:
        request.transport.close()
    return web.Response()


async def _half(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
    """Send a good reply's head and the first half of its body, then hang up."""
    whole = msgspec.json.encode(reply)
    response = web.StreamResponse(status=201, headers={"Content-Type": "application/json"})
    response.content_length = len(whole)
    await response.prepare(request)
    await response.write(whole[: len(whole) // 2])
    return await _hang_up(request, reply)


async def _stall(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
    """Send a good reply's head and no body, and keep the connection open."""
    response = web.StreamResponse(status=201, headers={"Content-Type": "application/json"})
    response.content_length = 100
    await response.prepare(request)
    return await _silence(request, reply)


async def _redirect(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
    """Send the caller to the same place again: a POST that is followed is a second POST."""
    return web.Response(status=307, headers={"Location": str(request.rel_url)})


def _with_status(status: int, **headers: str) -> Answer:
    async def answer(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
        return web.json_response({"error": f"fault {status}"}, status=status, headers=headers)

    return answer


def _html(status: int) -> Answer:
    async def answer(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
        return web.Response(status=status, text="<h1>All is well</h1>", content_type="text/html")

    return answer


def _altered(code: int = 201, /, **changes: object) -> Answer:
    async def answer(request: web.Request, reply: dict[str, object]) -> web.StreamResponse:
        return web.json_response(reply | changes, status=code)

    return answer


FAULTS: dict[str, Fault] = {
    "silent_before_charge": Fault(0, _silence),
    "silent_after_charge": Fault(1, _silence),
    "slow": Fault(1, _slow),
    "reset_before_charge": Fault(0, _reset),
    "reset_after_charge": Fault(1, _reset),
    "hang_up_before_charge": Fault(0, _hang_up),
    "hang_up_after_charge": Fault(1, _hang_up),
    "half_reply": Fault(1, _half),
    "stalled_reply": Fault(1, _stall),
    "500_before_charge": Fault(0, _with_status(500)),
    "500_after_charge": Fault(1, _with_status(500)),
    "503_before_charge": Fault(0, _with_status(503, **{"Retry-After": "1"})),
    "redirect_before_charge": Fault(0, _redirect),
    "redirect_after_charge": Fault(1, _redirect),
    "html_201": Fault(1, _html(201)),
    "html_402": Fault(0, _html(402)),
    "huge_201": Fault(1, _altered(padding="x" * 1_000_000)),
    "pending_201": Fault(1, _altered(status="pending")),
    "other_reference_201": Fault(1, _altered(reference="someone-else")),
    "no_id_201": Fault(1, _altered(id="")),
    "unsafe_id_201": Fault(1, _altered(id="ch_\x00")),
    "succeeded_402": Fault(1, _altered(402)),
    "bare_402": Fault(0, _with_status(402)),
    "good_200": Fault(1, _altered(200)),
    "empty_204": Fault(1, _with_status(204)),
    "400": Fault(0, _with_status(400)),
    "401": Fault(0, _with_status(401)),
    "403": Fault(0, _with_status(403)),
    "404": Fault(0, _with_status(404)),
    "409": Fault(0, _with_status(409)),
    "429": Fault(0, _with_status(429, **{"Retry-After": "7"})),
}

#: Faults of the books rather than of the reply, which is one of those above or good.
BOOK_FAULTS: dict[str, Fault] = {
    "reset_and_shown_late": Fault(1, _reset, unseen=UNSEEN),
    "reset_after_two_charges": Fault(2, _reset),
    "two_charges_201": Fault(2, _altered()),
}


def fault_for(payment_token: str, post: int = 1) -> Fault | None:
    """The fault this token asks for at the `post`-th POST of a reference; `None` for none.

    Raises `KeyError` for an unknown fault.
    """
    if not payment_token.startswith(PREFIX):
        return None
    name = payment_token.removeprefix(PREFIX)
    fault = (FAULTS | BOOK_FAULTS)[name.removeprefix(ONCE)]
    return None if name.startswith(ONCE) and post > 1 else fault
