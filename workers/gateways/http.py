"""The gateway to a provider that speaks the contract of `workers.gateways`, over HTTP/1.1."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final

import aiohttp
import msgspec
from yarl import URL

from workers.gateways.body import GuardedBody
from workers.gateways.outcomes import (
    Capabilities,
    ChargeOutcome,
    ChargeRecord,
    ChargeRequest,
    GatewayUnavailable,
    InDoubt,
    NotSent,
)
from workers.gateways.replies import judge_body, judge_status, read_found

#: A reply is a few hundred bytes. 64 KiB leaves room for a long list of charges, and a provider gone mad
#: cannot fill the worker's memory: at 512 slots it is 32 MB.
MAX_REPLY: Final = 64 * 1024

#: Seconds an idle connection is kept. A connection the provider closes just as we use it leaves a charge in
#: doubt, so we let go first: Node.js and uvicorn close after 5 s, and most others later.
KEEP_ALIVE: Final = 3.0

#: Connections for questions. They have their own, so that a reconciliation of many purchases takes no
#: charge's slot; four answer some hundred questions a second, and questions are never urgent.
FIND_CONNECTIONS: Final = 4


class HttpGateway:
    """Charges over HTTP. Every call is one request: nothing is repeated, and no redirect is followed.

    `url` is the provider's base address, to which `/charges` is added. `call_timeout` bounds a whole call in
    seconds, from `charge` or `find` to the last byte of the reply, waiting for a connection included.
    `connections` is the most charges in flight at once; give at least the number of call slots, or calls wait
    here until their `start_by` passes.

    Raises `ValueError` for an address or a number that cannot work; the message does not repeat the address,
    which may hold a password.
    """

    def __init__(self, url: str, *, call_timeout: float, connections: int) -> None:
        base = URL(url)
        if base.scheme not in ("http", "https") or not base.host or base.query_string or base.fragment:
            raise ValueError("the payment address must be http(s)://host[:port][/path], with no query and no fragment")
        if not (math.isfinite(call_timeout) and call_timeout > 0):
            raise ValueError("the call timeout must be a positive number of seconds")
        if connections < 1:
            raise ValueError("at least one connection is needed")
        self._charges_url = base / "charges"
        self._call_timeout = call_timeout
        self._connections = connections
        # Made on first use: a session belongs to the running loop, and a gateway may be loaded before that.
        self._charging: aiohttp.ClientSession | None = None
        self._asking: aiohttp.ClientSession | None = None
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(deduplicates=False, can_find=True, long_calls=False)

    async def charge(self, request: ChargeRequest, *, start_by: float) -> ChargeOutcome:
        """See `Gateway.charge`."""
        if self._closed:
            return NotSent("closed")
        try:
            body = GuardedBody(_encode(request), start_by=start_by)
        except (TypeError, ValueError):
            return NotSent("client_fault", alert=True)
        failure: Exception | None = None
        outcome: ChargeOutcome | None = None
        try:
            async with asyncio.timeout(self._call_timeout):
                outcome = await self._post(request.reference, body, start_by)
        except Exception as error:  # noqa: BLE001 - outcomes are data; `begun` tells which
            failure = error
        except asyncio.CancelledError:
            # Closing a session cancels those who wait for its connections: that is not our caller's wish.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            failure = ConnectionAbortedError("the gateway was closed")
        finally:
            body.withdraw()
        if body.begun:
            return outcome or InDoubt(_why_in_doubt(failure))
        if body.held_back is not None:
            return NotSent(body.held_back)
        if time.monotonic() >= start_by:
            return NotSent("too_late")
        if outcome is not None:
            # A reply to what was never asked: stray bytes on a kept connection. It says nothing about us.
            return NotSent("connection_unclean")
        return _unsent(failure)

    async def _post(self, reference: str, body: GuardedBody, start_by: float) -> ChargeOutcome | None:
        waiting = start_by - time.monotonic()
        if waiting <= 0:  # aiohttp would take a wait of 0 for one without end
            return None
        # `connect` also ends the wait for a free connection: past `start_by` there is nothing to wait for.
        timeout = aiohttp.ClientTimeout(total=None, connect=waiting, ceil_threshold=math.inf)
        headers = {"Idempotency-Key": reference, "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._charging is None:
            self._charging = _session(self._connections)
        async with self._charging.post(
            self._charges_url, data=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            judged = judge_status(response.status, response.headers)
            if judged is not None:
                return judged
            content = await _read_bounded(response)
            if content is None:
                return InDoubt("reply_too_large")
            return judge_body(response.status, content, reference)

    async def find(self, reference: str) -> list[ChargeRecord]:
        """See `Gateway.find`."""
        if self._closed:
            raise GatewayUnavailable("the gateway is closed")
        if self._asking is None:
            self._asking = _session(FIND_CONNECTIONS)
        try:
            async with (
                asyncio.timeout(self._call_timeout),
                self._asking.get(
                    self._charges_url,
                    params={"reference": reference},
                    headers={"Accept": "application/json", "Accept-Encoding": "identity"},
                    timeout=aiohttp.ClientTimeout(total=None),
                    allow_redirects=False,
                ) as response,
            ):
                if response.status != 200:
                    raise GatewayUnavailable(f"the provider answered {response.status} to a question")
                content = await _read_bounded(response)
        except GatewayUnavailable:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise GatewayUnavailable("the gateway was closed") from error
        except Exception as error:
            raise GatewayUnavailable(f"the provider gave no answer: {type(error).__name__}") from error
        if content is None:
            raise GatewayUnavailable("the provider's answer is too large")
        return read_found(content, reference)

    async def close(self) -> None:
        """See `Gateway.close`."""
        self._closed = True
        for session in (self._charging, self._asking):
            if session is not None:
                await session.close()


def _encode(request: ChargeRequest) -> bytes:
    return msgspec.json.encode(
        {
            "reference": request.reference,
            "amount": request.amount,
            "currency": request.currency,
            "customer": request.customer,
            "payment_token": request.payment_token,
        }
    )


def _session(connections: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=KEEP_ALIVE),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes | None:
    """The whole body, or `None` when it is larger than `MAX_REPLY`. Raises when it was cut."""
    content = bytearray()
    async for part in response.content.iter_any():
        content += part
        if len(content) > MAX_REPLY:
            return None
    return bytes(content)


def _why_in_doubt(failure: Exception | None) -> str:
    match failure:
        case TimeoutError():
            return "timeout"
        case aiohttp.ClientPayloadError():
            return "reply_cut"
        case aiohttp.ClientResponseError():
            return "reply_malformed"
        case aiohttp.ClientConnectionError() | OSError():
            return "connection_lost"
        case _:
            return "client_fault"


def _unsent(failure: Exception | None) -> NotSent:
    match failure:
        case aiohttp.ClientConnectorDNSError():
            return NotSent("dns")
        case aiohttp.ClientSSLError():
            return NotSent("tls")
        case TimeoutError():
            return NotSent("connect_timeout")
        case aiohttp.ClientConnectionError() | OSError():
            return NotSent("unreachable")
        case _:
            # Ours: a header that cannot be written, say. It would fail the same way again.
            return NotSent("client_fault", alert=True)
