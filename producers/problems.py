"""Every kind of error the API answers with, and its one form: `application/problem+json` (RFC 9457).

A handler raises `Problem`, or returns `response(problem)` where raising would cost too much. Exceptions that are no
`Problem` become one in `producers.failures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from starlette.responses import Response

from producers.json_answer import JsonAnswer
from shared.errors import FairlaneError

MEDIA_TYPE: Final = "application/problem+json"


@dataclass(frozen=True, slots=True)
class ProblemType:
    """One kind of error: `type` is `/problems/<slug>`, a page that says what it means and what to do.

    `retry_after` is the default of the header Retry-After in seconds; None where waiting does not help.
    """

    slug: str
    title: str
    status: int
    meaning: str
    what_to_do: str
    retry_after: int | None = None

    @property
    def type(self) -> str:
        """The URI reference that identifies this kind of error."""
        return f"/problems/{self.slug}"


IDEMPOTENCY_KEY_MISSING = ProblemType(
    "idempotency-key-missing",
    "Idempotency key missing",
    400,
    "A purchase was sent without an Idempotency-Key, or with one that is not 1 to 255 visible ASCII characters. "
    "Nothing was recorded.",
    "Make one key per purchase, for example a UUID, keep it, and send it with every repetition of the same purchase.",
)
MALFORMED = ProblemType(
    "malformed",
    "Malformed request",
    400,
    "The request does not have the form the API asks for. Each field at fault is named in errors. Nothing was changed.",
    "Correct the fields named in errors and send the request again. The form is described under /docs.",
)
UNAUTHORIZED = ProblemType(
    "unauthorized",
    "API key missing or unknown",
    401,
    "The request carried no API key, or one that is not known here.",
    "Send the header “Authorization: Bearer <key>” with a key that the operator gave you.",
)
FORBIDDEN = ProblemType(
    "forbidden",
    "Not allowed with this API key",
    403,
    "The API key is known, but its role does not allow this.",
    "Use a key with the role admin, or ask the operator to do it.",
)
UNKNOWN_ITEM = ProblemType(
    "unknown-item",
    "Unknown item",
    404,
    "No item has this name. Names are compared exactly, with upper and lower case.",
    "Check the name. If it is right, an admin has to create the item first.",
)
UNKNOWN_PURCHASE = ProblemType(
    "unknown-purchase",
    "Unknown purchase",
    404,
    "No purchase of this client has this id. A purchase of another client is answered in the same way.",
    "Check the id, and that the API key belongs to the client that made the purchase.",
)
NOT_FOUND = ProblemType(
    "not-found",
    "Nothing here",
    404,
    "The API has nothing at this address.",
    "Check the path. Everything the API serves is listed under /docs.",
)
METHOD_NOT_ALLOWED = ProblemType(
    "method-not-allowed",
    "Method not allowed",
    405,
    "There is something at this address, but it does not take this method.",
    "Use one of the methods in the header Allow.",
)
SOLD_OUT = ProblemType(
    "sold-out",
    "Sold out",
    409,
    "Less is left of the item than was asked for, and no unpaid hold could make up for it. The purchase was refused "
    "at the door; nothing was recorded and nothing is charged.",
    "Ask for less, if that is of use, or stop. Stock returns only when an admin adds some.",
)
NOT_ON_SALE = ProblemType(
    "not-on-sale",
    "Not on sale now",
    409,
    "The item is sold between its opening and its closing time only, and it is not open now. Nothing was recorded.",
    "Come back when the sale is open. The times are opens_at and closes_at of the item.",
)
REQUEST_TIMEOUT = ProblemType(
    "request-timeout",
    "Request not complete in time",
    408,
    "The request began, and its head or its body did not arrive whole in the time there is for it. Nothing was "
    "recorded. The connection is closed.",
    "Send the same request again, on another connection and in one go.",
)
TOO_LATE = ProblemType(
    "too-late",
    "Too late to cancel",
    409,
    "The purchase is settled, or may have been charged already. It stays as it is.",
    "Ask for the purchase to see how it ended. A paid purchase is given back by a refund, outside of this API.",
)
STOCK_BELOW_COMMITTED = ProblemType(
    "stock-below-committed",
    "Stock below what is held or sold",
    409,
    "The new stock is less than the units already held for purchases or sold. The item was not changed.",
    "Set the stock to held + sold or more. Held units may still fall back: ask for the item and try again later.",
)
PRECONDITION_FAILED = ProblemType(
    "precondition-failed",
    "The item is another by now",
    412,
    "The request was to change the item only if it still has an ETag of the header If-Match. It has another one, or "
    "there is no such item. It was not changed. An ETag changes with every change, also when units are held or sold.",
    "Ask for the item, look at what changed, and send the request again with the new ETag, or without If-Match.",
)
TOO_LARGE = ProblemType(
    "too-large",
    "Body too large",
    413,
    "The body of the request is larger than 16 KiB. No valid request is.",
    "Send only the fields that the API asks for.",
)
NOT_JSON = ProblemType(
    "not-json",
    "Not JSON",
    415,
    "The request has a body whose content type is not application/json.",
    "Send the body as JSON, with the header “Content-Type: application/json”.",
)
IDEMPOTENCY_KEY_REUSED = ProblemType(
    "idempotency-key-reused",
    "Idempotency key used for another purchase",
    422,
    "A purchase with this Idempotency-Key exists, and it was made with another body. The existing purchase stays as "
    "it is; nothing was recorded.",
    "Send the body of the first request to get that purchase, or a new key to make another one.",
)
RATE_LIMITED = ProblemType(
    "rate-limited",
    "Too many requests",
    429,
    "More requests to buy came from this client, or for this customer, than the operator allows. Nothing was recorded.",
    "Wait as long as the header Retry-After says, in seconds, and send the same request with the same key. The header "
    "RateLimit-Policy says what is allowed, and RateLimit what is left of it.",
    retry_after=1,
)
HEADERS_TOO_LARGE = ProblemType(
    "headers-too-large",
    "Request line or headers too large",
    431,
    "What comes before the body of the request has more than 64 KiB or more than 100 headers. No valid request has. "
    "Nothing was recorded. The connection is closed.",
    "Send only the headers that the API asks for. Behind a site with many cookies, leave these away.",
)
INTERNAL_ERROR = ProblemType(
    "internal-error",
    "Internal error",
    500,
    "The API failed in a way nobody foresaw. A purchase may or may not have been recorded.",
    "Send the same request with the same Idempotency-Key again: if the purchase was recorded, you get it. If the error "
    "stays, tell the operator; the cause is in the log.",
)
QUEUE_FULL = ProblemType(
    "queue-full",
    "Too many purchases at once",
    503,
    "More purchases wait already than there is stock for, or more than can be recorded in time, or more come than the "
    "operator lets in. This one was not recorded.",
    "Wait as long as the header Retry-After says, in seconds, and send the same request with the same key.",
    retry_after=1,
)
UNAVAILABLE = ProblemType(
    "unavailable",
    "Not available now",
    503,
    "A part that is needed for a safe answer, such as the database, did not answer. A purchase may or may not have "
    "been recorded.",
    "Wait as long as the header Retry-After says, in seconds, and send the same request with the same Idempotency-Key: "
    "if the purchase was recorded, you get it.",
    retry_after=1,
)

CATALOGUE: Final[Mapping[str, ProblemType]] = {
    problem_type.slug: problem_type
    for problem_type in (
        IDEMPOTENCY_KEY_MISSING,
        MALFORMED,
        UNAUTHORIZED,
        FORBIDDEN,
        UNKNOWN_ITEM,
        UNKNOWN_PURCHASE,
        NOT_FOUND,
        METHOD_NOT_ALLOWED,
        REQUEST_TIMEOUT,
        SOLD_OUT,
        NOT_ON_SALE,
        TOO_LATE,
        STOCK_BELOW_COMMITTED,
        PRECONDITION_FAILED,
        TOO_LARGE,
        NOT_JSON,
        IDEMPOTENCY_KEY_REUSED,
        RATE_LIMITED,
        HEADERS_TOO_LARGE,
        INTERNAL_ERROR,
        QUEUE_FULL,
        UNAVAILABLE,
    )
}
"""Every kind of error by its slug, in the order of their statuses."""


class Problem(FairlaneError):
    """A request that is answered with an error.

    `detail` says what is wrong with this request; it is sent as it is, so it repeats neither a secret nor a large
    input. `retry_after` (seconds) replaces the kind's own. `extensions` become further members of the answer.
    """

    def __init__(
        self,
        problem_type: ProblemType,
        detail: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        **extensions: Any,
    ) -> None:
        self.problem_type = problem_type
        self.detail = detail or problem_type.meaning
        self.retry_after = problem_type.retry_after if retry_after is None else retry_after
        self.headers = headers or {}
        self.extensions = extensions
        super().__init__(f"{problem_type.slug}: {self.detail}")


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field of a request. `field` is its name, with dots for depth, or `body` for the whole."""

    field: str
    detail: str


def malformed(errors: Sequence[FieldError]) -> Problem:
    """The problem of a request at least one of whose fields is wrong; each is named."""
    first, *others = errors
    more = f" (and {len(others)} more, see errors)" if others else ""
    return Problem(MALFORMED, f"{first.field}: {first.detail}{more}", errors=errors)


def response(problem: Problem) -> Response:
    """The answer that tells a client of this problem."""
    kind = problem.problem_type
    headers = dict(problem.headers)
    if problem.retry_after is not None:
        headers["Retry-After"] = str(problem.retry_after)
    body = {
        "type": kind.type,
        "title": kind.title,
        "status": kind.status,
        "detail": problem.detail,
        **problem.extensions,
    }
    return JsonAnswer(msgspec.json.encode(body), kind.status, headers, MEDIA_TYPE)
