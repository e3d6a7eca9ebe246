"""The OpenAPI entries of `/v1/purchases`, whose routes are plain ones that the framework does not describe."""

from __future__ import annotations

from typing import Any, Final

from producers.openapi import BEARER, RETRY_AFTER, problem_responses
from producers.problems import (
    IDEMPOTENCY_KEY_MISSING,
    IDEMPOTENCY_KEY_REUSED,
    INTERNAL_ERROR,
    MALFORMED,
    NOT_JSON,
    NOT_ON_SALE,
    QUEUE_FULL,
    RATE_LIMITED,
    SOLD_OUT,
    TOO_LARGE,
    TOO_LATE,
    UNAUTHORIZED,
    UNAVAILABLE,
    UNKNOWN_ITEM,
    UNKNOWN_PURCHASE,
)
from producers.watching_described import NOT_MODIFIED, WATCHING_HEADERS, WATCHING_PARAMETERS
from shared.items import SKU_PATTERN
from shared.states import FINAL, Reason, Status

Json = dict[str, Any]

_ID: Final = "9f86d081884c7d659a2feaa0c55ad015"
#: 1 to 255 visible ASCII characters: not in quotes, or in quotes, where a backslash may stand before `"` and itself.
_KEY: Final = r'^([!#-~][!-~]{0,254}|"[!-~]{0,253}[!#-~]|"|"(\\["\\]|[!-~]){1,255}")$'
_TIME: Final[Json] = {
    "type": "string",
    "format": "date-time",
    "description": "RFC 3339, UTC, six fraction digits.",
}
#: What its id is good for.
_LINKS: Final[Json] = {
    name: {"operationId": operation, "parameters": {"id": "$response.body#/id"}, "description": description}
    for name, operation, description in (
        ("Purchase", "get_purchase", "How it stands."),
        ("Events", "get_purchase_events", "How it stands, as it changes."),
        ("Cancel", "cancel_purchase", "To call it off."),
        ("Status", "get_status", "How it stands, without a key."),
        ("StatusEvents", "get_status_events", "The same as it changes."),
    )
}
#: What `customer` and `payment_token` may hold: printable characters, so no separator other than the space, and nothing
#: that has no shape of its own.
_PRINTABLE: Final[Json] = {
    "type": "string",
    "minLength": 1,
    "maxLength": 255,
    "pattern": r"^[\p{L}\p{M}\p{N}\p{P}\p{S} ]+$",
}

REQUEST_EXAMPLE: Final[Json] = {
    "item": "sku-1",
    "quantity": 1,
    "customer": "c-42",
    "payment_token": "tok_visa",
}

_EXAMPLE_QUEUED: Final[Json] = {
    "id": _ID,
    "status": "queued",
    "reason": None,
    "item": "sku-1",
    "quantity": 1,
    "customer": "c-42",
    "amount": 4900,
    "currency": "EUR",
    "charge_id": None,
    "position": 12,
    "accepted_at": "2026-01-31T09:00:00.000000Z",
    "decided_at": None,
    "finished_at": None,
}
_EXAMPLE_CANCELLED: Final[Json] = _EXAMPLE_QUEUED | {
    "status": "cancelled",
    "reason": "cancelled_by_client",
    "position": None,
    "finished_at": "2026-01-31T09:00:00.050000Z",
}
_EXAMPLE_CONFIRMED: Final[Json] = _EXAMPLE_QUEUED | {
    "status": "confirmed",
    "charge_id": "ch_1",
    "position": None,
    "decided_at": "2026-01-31T09:00:00.120000Z",
    "finished_at": "2026-01-31T09:00:00.310000Z",
}

SCHEMAS: Final[Json] = {
    "PurchaseRequest": {
        "title": "PurchaseRequest",
        "type": "object",
        "additionalProperties": False,
        "required": ["item", "quantity", "customer", "payment_token"],
        "properties": {
            "item": {"type": "string", "pattern": SKU_PATTERN, "description": "The item's name."},
            "quantity": {"type": "integer", "minimum": 1, "maximum": 1000},
            "customer": _PRINTABLE | {"description": "Who buys, by the client's own name for them."},
            "payment_token": _PRINTABLE
            | {
                "writeOnly": True,
                "description": "Sent to the payment provider; never shown again, and erased once the purchase is "
                "final.",
            },
        },
        "examples": [REQUEST_EXAMPLE],
    },
    "Purchase": {
        "title": "Purchase",
        "type": "object",
        "required": list(_EXAMPLE_QUEUED),
        "properties": {
            "id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            "status": {
                "type": "string",
                "enum": [str(status) for status in Status],
                "description": f"Final, so it never changes again: {', '.join(sorted(FINAL))}.",
            },
            "reason": {
                "type": ["string", "null"],
                "description": "Why it stands where it stands. One of "
                + ", ".join(f"`{reason}`" for reason in Reason)
                + ", or the payment provider's own word for a declined payment.",
            },
            "item": {"type": "string", "pattern": SKU_PATTERN},
            "quantity": {"type": "integer", "minimum": 1, "maximum": 1000},
            "customer": {"type": "string"},
            "amount": {
                "type": "integer",
                "minimum": 0,
                "description": "In minor units: the price when the purchase was accepted, times the quantity.",
            },
            "currency": {"type": "string", "pattern": "^[A-Z]{3}$"},
            "charge_id": {"type": ["string", "null"], "description": "The provider's id of the charge."},
            "position": {
                "type": ["integer", "null"],
                "minimum": 0,
                "description": "At most how many stand before it in its lane, itself included; only while queued, "
                "and not yet in the answer to the POST.",
            },
            "accepted_at": _TIME,
            "decided_at": _TIME | {"type": ["string", "null"], "description": "When stock was given or refused."},
            "finished_at": _TIME | {"type": ["string", "null"], "description": "When the status became final."},
        },
        "examples": [_EXAMPLE_QUEUED, _EXAMPLE_CONFIRMED],
    },
}


def _purchase(example: Json) -> Json:
    return {
        "application/json": {"schema": {"$ref": "#/components/schemas/Purchase"}, "example": example},
    }


_TEXT: Final[Json] = {"type": "string"}
_REPLAYED: Final[Json] = {
    "description": "`true` when the purchase existed already: the same key and body came before.",
    "schema": {"type": "string", "enum": ["true"]},
}
_ETAG: Final[Json] = {"description": "Changes with every change of the purchase.", "schema": _TEXT}
_ID_IN_PATH: Final[Json] = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The purchase's id.",
    "schema": {"type": "string"},
    "example": _ID,
}
_LOCATION: Final[Json] = {"description": "The purchase's path.", "schema": _TEXT}
_RATE_LIMIT_POLICY: Final[Json] = {
    "description": "Only while the operator has set limits: per limit, how many requests may come at once (`q`) and in "
    "how many seconds as many may come again (`w`). `client` counts the requests of the API key's client, `customer` "
    "those for one of its customers. A request with a new key counts even if it is refused (404, 409, 503), but not if "
    "a limit refuses it. Repeating an accepted request soon after does not count. "
    "(draft-ietf-httpapi-ratelimit-headers)",
    "schema": _TEXT,
    "example": '"client";q=100;w=2, "customer";q=5;w=10',
}
_RATE_LIMIT: Final[Json] = {
    "description": "With RateLimit-Policy: per limit, how many requests may come now (`r`), and after how many seconds "
    "without one it is as if none had come (`t`).",
    "schema": _TEXT,
    "example": '"client";r=99;t=1, "customer";r=4;t=2',
}


def _limited(responses: Json) -> Json:
    """These answers with the header fields of rate limits: the door was asked of those that have both."""
    for status, answer in responses.items():
        headers = answer.setdefault("headers", {})
        if status not in {"413", "415", "500"}:
            headers["RateLimit-Policy"] = _RATE_LIMIT_POLICY
        if status not in {"400", "401", "413", "415", "500"}:
            headers["RateLimit"] = _RATE_LIMIT
    return responses


PATHS: Final[Json] = {
    "/v1/purchases": {
        "post": {
            "operationId": "post_purchase",
            "tags": ["purchases"],
            "summary": "Buy",
            "description": "Accepts a purchase. It is recorded before the answer is sent, so a 202 is never forgotten; "
            "it is decided and paid for afterwards, in the order of acceptance. Without an answer, or after a 429, "
            "500 or 503, send the same request with the same key again: one key makes one purchase.",
            "security": BEARER,
            "parameters": [
                {
                    "name": "Idempotency-Key",
                    "in": "header",
                    "required": True,
                    "description": "1 to 255 visible ASCII characters, bare or as a quoted string; one per purchase.",
                    "schema": {"type": "string", "minLength": 1, "maxLength": 512, "pattern": _KEY},
                    "example": "4f9c2a6e-1d0b-4c53-9a64-0a1c3bb0a7f1",
                }
            ],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/PurchaseRequest"},
                        "example": REQUEST_EXAMPLE,
                    }
                },
            },
            "responses": _limited(
                {
                    "202": {
                        "description": "Accepted, or accepted before with the same key and body and not final yet.",
                        "headers": {
                            "Location": _LOCATION,
                            "Retry-After": RETRY_AFTER,
                            "Idempotent-Replayed": _REPLAYED,
                        },
                        "content": _purchase(_EXAMPLE_QUEUED | {"position": None}),
                        "links": _LINKS,
                    },
                    "200": {
                        "description": "Accepted before with the same key and body, and final by now.",
                        "headers": {"Location": _LOCATION, "Idempotent-Replayed": _REPLAYED},
                        "content": _purchase(_EXAMPLE_CONFIRMED),
                        "links": _LINKS,
                    },
                    **problem_responses(
                        IDEMPOTENCY_KEY_MISSING,
                        MALFORMED,
                        UNAUTHORIZED,
                        UNKNOWN_ITEM,
                        SOLD_OUT,
                        NOT_ON_SALE,
                        TOO_LARGE,
                        NOT_JSON,
                        IDEMPOTENCY_KEY_REUSED,
                        RATE_LIMITED,
                        INTERNAL_ERROR,
                        QUEUE_FULL,
                        UNAVAILABLE,
                    ),
                }
            ),
        }
    },
    "/v1/purchases/{id}": {
        "get": {
            "operationId": "get_purchase",
            "tags": ["purchases"],
            "summary": "See how a purchase stands",
            "description": "A purchase of another client is answered like one that does not exist.",
            "security": BEARER,
            "parameters": [
                _ID_IN_PATH,
                *WATCHING_PARAMETERS,
            ],
            "responses": {
                "200": {
                    "description": "The purchase as it stands.",
                    "headers": WATCHING_HEADERS,
                    "content": _purchase(_EXAMPLE_CONFIRMED),
                },
                "304": NOT_MODIFIED,
                **problem_responses(UNAUTHORIZED, UNKNOWN_PURCHASE, INTERNAL_ERROR, UNAVAILABLE),
            },
        },
        "delete": {
            "operationId": "cancel_purchase",
            "tags": ["purchases"],
            "summary": "Cancel a purchase",
            "description": "A purchase can be cancelled while it is `queued`, `waitlisted` or `reserved`, and surely "
            "no charge of it was sent. What it held goes to whoever waits. Cancelling again is answered in the same "
            "way, so a request that got no answer, or a 500 or 503, may be sent again.",
            "security": BEARER,
            "parameters": [_ID_IN_PATH],
            "responses": {
                "200": {
                    "description": "The purchase is `cancelled`, now or before.",
                    "headers": {"ETag": _ETAG},
                    "content": _purchase(_EXAMPLE_CANCELLED),
                },
                **problem_responses(UNAUTHORIZED, UNKNOWN_PURCHASE, TOO_LATE, INTERNAL_ERROR, UNAVAILABLE),
            },
        },
    },
}
"""OpenAPI path items, by path."""
