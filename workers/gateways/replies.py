"""What a provider's reply means. Pure: no sockets, no clock but the one passed in.

The table is in the docstring of `workers.gateways`. Where it leaves room:

* A 201 counts only when all of it arrived and all of it is right: JSON, `status` `succeeded`, our
  `reference`, a usable `id`. The id is stored and shown, so it must be visible ASCII; anything else could
  make the outcome unrecordable.
* A 402 must be a JSON object that does not contradict itself; `reason`, `id` and even `status` may be
  missing. A 402 that cannot be read is in doubt, not declined: a decline is final and gives the stock away,
  while doubt costs one question to the provider a minute later. Proxies answer 402 in HTML, too.
* 200, 202 and 204 are in doubt like every other success we do not know: the contract's word for "charged" is
  201.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Annotated, Literal

import msgspec

from workers.gateways.outcomes import (
    ChargeOutcome,
    ChargeRecord,
    Confirmed,
    Declined,
    GatewayUnavailable,
    InDoubt,
    NotSent,
)

#: Statuses by which a provider says "I did nothing, and an operator must act": bad key, not allowed, wrong
#: address.
NEEDS_OPERATOR = frozenset({401, 403, 404})

#: The longest wait we let a provider ask for, in seconds: an hour. A hold lasts minutes, and a wrong unit or
#: a clock that is off must not park a purchase for days.
MAX_RETRY_AFTER = 3600.0

#: The longest decline reason that is kept: a sentence. It is shown to customers and stored with each
#: purchase.
MAX_REASON = 100

_Id = Annotated[str, msgspec.Meta(pattern=r"\A[\x21-\x7e]{1,255}\Z")]


class _Succeeded(msgspec.Struct):
    id: _Id
    reference: str
    status: Literal["succeeded"]


class _Refused(msgspec.Struct):
    id: object = None
    reference: object = None
    status: Literal["declined"] = "declined"
    reason: object = None


class _Found(msgspec.Struct):
    id: _Id
    status: Annotated[str, msgspec.Meta(min_length=1, max_length=50)]
    reference: str | None = None


class _FoundAll(msgspec.Struct):
    charges: list[_Found]


def judge_status(status: int, headers: Mapping[str, str]) -> ChargeOutcome | None:
    """The outcome where the status alone decides; `None` for 201 and 402, whose body must be read."""
    if status in (201, 402):
        return None
    if status in (400, 422):
        return Declined("provider_rejected")
    if status in NEEDS_OPERATOR:
        return NotSent(f"http_{status}", alert=True)
    if status == 429:
        return NotSent("http_429", retry_after=retry_after(headers.get("Retry-After"), now=time.time()))
    return InDoubt(f"http_{status}")


def judge_body(status: int, body: bytes, reference: str) -> ChargeOutcome:
    """The outcome of a complete 201 or 402 reply to the charge of `reference`."""
    return _judge_success(body, reference) if status == 201 else _judge_decline(body, reference)


def _judge_success(body: bytes, reference: str) -> Confirmed | InDoubt:
    try:
        reply = msgspec.json.decode(body, type=_Succeeded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return InDoubt("unreadable_201")
    if reply.reference != reference:
        return InDoubt("other_reference")
    return Confirmed(reply.id)


def _judge_decline(body: bytes, reference: str) -> Declined | InDoubt:
    try:
        reply = msgspec.json.decode(body, type=_Refused)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return InDoubt("unreadable_402")
    if reply.reference not in (None, reference):
        return InDoubt("other_reference")
    reason = reply.reason if isinstance(reply.reason, str) else ""
    reason = "".join(char for char in reason if char.isprintable())[:MAX_REASON].strip()
    known = isinstance(reply.id, str) and re.fullmatch(r"[\x21-\x7e]{1,255}", reply.id)
    return Declined(reason or "declined", str(reply.id) if known else None)


def read_found(body: bytes, reference: str) -> list[ChargeRecord]:
    """The charges in a complete 200 reply to the question for `reference`.

    Raises `GatewayUnavailable` when the reply is not what was asked for: not the documented shape, or with a
    charge of another reference in it (a provider that ignores the filter must not confirm a stranger's
    purchase).
    """
    try:
        found = msgspec.json.decode(body, type=_FoundAll).charges
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise GatewayUnavailable("the provider's list of charges cannot be read") from error
    if any(charge.reference not in (None, reference) for charge in found):
        raise GatewayUnavailable("the provider listed charges of another reference")
    return [ChargeRecord(charge.id, charge.status) for charge in found]


def retry_after(value: str | None, *, now: float) -> float | None:
    """Seconds to wait, from a `Retry-After` header (RFC 9110, section 10.2.3: seconds or a date), or `None`.

    `now` is in seconds since the epoch. A wait in the past, absurdly long or unreadable counts as none or as
    the longest.
    """
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return min(float(value), MAX_RETRY_AFTER)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - now
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)
