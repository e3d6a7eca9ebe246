"""The OpenAPI entries of what watches a purchase: waiting, events, and the public status."""

from __future__ import annotations

from typing import Any, Final

from producers.openapi import BEARER, RETRY_AFTER, problem_responses
from producers.preferences import LONGEST_WAIT
from producers.problems import INTERNAL_ERROR, UNAUTHORIZED, UNAVAILABLE, UNKNOWN_PURCHASE, ProblemType
from shared.states import FINAL, Status

Json = dict[str, Any]

_TEXT: Final[Json] = {"type": "string"}
_ID: Final = "9f86d081884c7d659a2feaa0c55ad015"
_ID_IN_PATH: Final[Json] = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The purchase's id.",
    "schema": _TEXT,
    "example": _ID,
}
_LAST_EVENT_ID: Final[Json] = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "The `id` of the last event received. Browsers send it by themselves when they connect again.",
    "schema": _TEXT,
    "example": "2",
}

WATCHING_PARAMETERS: Final[list[Json]] = [
    {
        "name": "Prefer",
        "in": "header",
        "required": False,
        "description": "`wait=N` (RFC 7240): hold the answer until the purchase changes, at most N seconds and at "
        f"most {LONGEST_WAIT}. What is final, or another state than If-None-Match names, is answered at once. The "
        "place in the line alone is no change. Anything else is ignored.",
        "schema": _TEXT,
        "example": "wait=20",
    },
    {
        "name": "If-None-Match",
        "in": "header",
        "required": False,
        "description": "The ETags of earlier answers, or `*`. A state older than one of them is never shown.",
        "schema": _TEXT,
        "example": '"2-0"',
    },
]
"""What every GET of a purchase takes."""

WATCHING_HEADERS: Final[Json] = {
    "ETag": {"description": "Changes with every change of the purchase and of its place in the line.", "schema": _TEXT},
    "Cache-Control": {
        "description": "Final states may be kept by the client; others are to be asked for again.",
        "schema": _TEXT,
    },
    "Preference-Applied": {"description": "`wait=N` when the request asked to wait.", "schema": _TEXT},
    "Retry-After": RETRY_AFTER
    | {
        "description": "Seconds to wait before asking again, from the place in the line and the lane's pace; not sent "
        "once the purchase is final."
    },
}
"""What every answer to it may carry."""

NOT_MODIFIED: Final[Json] = {
    "description": "Nothing changed since the answer whose ETag is in If-None-Match.",
    "headers": WATCHING_HEADERS,
}

_ORIGIN_HEADERS: Final[Json] = {
    "Access-Control-Allow-Origin": {
        "description": "The request's origin, if it is one of FAIRLANE_CORS_ORIGINS.",
        "schema": _TEXT,
    },
    "Vary": {"description": "`Origin`", "schema": _TEXT},
}
_STATUS_EXAMPLE: Final[Json] = {"status": "queued", "reason": None, "position": 1200, "estimated_seconds": 3}

SCHEMAS: Final[Json] = {
    "PurchaseStatus": {
        "title": "PurchaseStatus",
        "type": "object",
        "required": list(_STATUS_EXAMPLE),
        "additionalProperties": False,
        "properties": {
            "status": {
                "type": "string",
                "enum": [str(status) for status in Status],
                "description": f"Final, so it never changes again: {', '.join(sorted(FINAL))}.",
            },
            "reason": {"type": ["string", "null"], "description": "Why it stands where it stands."},
            "position": {
                "type": ["integer", "null"],
                "minimum": 1,
                "description": "At most how many stand before it in its lane, itself included; only while queued.",
            },
            "estimated_seconds": {
                "type": ["integer", "null"],
                "minimum": 1,
                "description": "Until it is decided, from the lane's pace; null unless that can be told.",
            },
        },
        "examples": [
            _STATUS_EXAMPLE,
            {"status": "confirmed", "reason": None, "position": None, "estimated_seconds": None},
        ],
    }
}


def _event(schema: str) -> Json:
    """One event of a stream."""
    return {
        "type": "object",
        "description": "One event.",
        "required": ["id", "event", "data"],
        "properties": {
            "id": {"type": "string", "pattern": "^[0-9]+$", "description": "The purchase's revision."},
            "event": _TEXT,
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"$ref": f"#/components/schemas/{schema}"},
            },
            "retry": {"type": "integer", "description": "Milliseconds; before the first event."},
        },
    }


def _events(
    operation: str, summary: str, description: str, schema: str, example: Json, headers: Json, *problems: ProblemType
) -> Json:
    return {
        "operationId": operation,
        "summary": summary,
        "description": description
        + " Each event is a change; its `id` is the purchase's revision, its `data` the JSON of the purchase as it is "
        "then. The stream ends when the purchase is final. It may end earlier: connect again with Last-Event-ID. A "
        "comment is sent every 15 s.",
        "parameters": [_ID_IN_PATH, _LAST_EVENT_ID],
        "responses": {
            "200": {
                "description": "Server-sent events until the purchase is final.",
                "headers": {
                    "Cache-Control": {"description": "`no-store`", "schema": _TEXT},
                    "X-Accel-Buffering": {"description": "`no`: proxies must not collect events.", "schema": _TEXT},
                }
                | headers,
                "content": {"text/event-stream": {"schema": _event(schema), "example": example}},
            },
            "204": {
                "description": "The purchase is final, and Last-Event-ID says that the client knows how it ended.",
                "headers": {"Cache-Control": {"description": "`no-store`", "schema": _TEXT}} | headers,
            },
            **problem_responses(*problems, UNKNOWN_PURCHASE, INTERNAL_ERROR, UNAVAILABLE),
        },
    }


PATHS: Final[Json] = {
    "/v1/purchases/{id}/events": {
        "get": _events(
            "get_purchase_events",
            "Watch a purchase",
            "A purchase of another client is answered like one that does not exist.",
            "Purchase",
            {"id": "2", "event": "purchase", "data": f'{{"id":"{_ID}","status":"reserved", ...}}'},
            {},
            UNAUTHORIZED,
        )
        | {"tags": ["purchases"], "security": BEARER},
    },
    "/v1/status/{id}": {
        "get": {
            "operationId": "get_status",
            "tags": ["status"],
            "summary": "See where a purchase stands",
            "description": "Whoever knows the id may ask. Nothing of the purchase is shown but where it stands.",
            "parameters": [_ID_IN_PATH, *WATCHING_PARAMETERS],
            "responses": {
                "200": {
                    "description": "Where the purchase stands.",
                    "headers": WATCHING_HEADERS | _ORIGIN_HEADERS,
                    "content": {
                        "application/json": {
                            "schema": {"$ref": "#/components/schemas/PurchaseStatus"},
                            "example": _STATUS_EXAMPLE,
                        }
                    },
                },
                "304": NOT_MODIFIED | {"headers": WATCHING_HEADERS | _ORIGIN_HEADERS},
                **problem_responses(UNKNOWN_PURCHASE, INTERNAL_ERROR, UNAVAILABLE),
            },
        }
    },
    "/v1/status/{id}/events": {
        "get": _events(
            "get_status_events",
            "Watch where a purchase stands",
            "For an EventSource in the buyer's browser. Whoever knows the id may watch.",
            "PurchaseStatus",
            {
                "id": "1",
                "event": "status",
                "data": '{"status":"queued","reason":null,"position":1200,"estimated_seconds":3}',
            },
            _ORIGIN_HEADERS,
        )
        | {"tags": ["status"]},
    },
}
"""OpenAPI path items, by path."""
