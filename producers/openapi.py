"""`/openapi.json`: what the framework writes of its routes, and what it cannot know.

Added are the plain routes of purchases (`purchases_described`), the problems each operation may answer with, and the
API key. Taken out are the framework's own validation errors: ours are problems with status 400.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from producers.problems import (
    FORBIDDEN,
    HEADERS_TOO_LARGE,
    INTERNAL_ERROR,
    MALFORMED,
    MEDIA_TYPE,
    NOT_JSON,
    PRECONDITION_FAILED,
    REQUEST_TIMEOUT,
    STOCK_BELOW_COMMITTED,
    TOO_LARGE,
    UNAUTHORIZED,
    UNAVAILABLE,
    UNKNOWN_ITEM,
    Problem,
    ProblemType,
)
from producers.request_ids import HEADER as REQUEST_ID

Json = dict[str, Any]

BEARER: Final[list[Json]] = [{"bearer": []}]

_PROBLEM: Final[Json] = {
    "title": "Problem",
    "type": "object",
    "description": "An error (RFC 9457). `type` is a page of this API that says what it means and what to do.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference", "pattern": "^/problems/[a-z-]+$"},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "What is wrong with this request."},
        "errors": {
            "type": "array",
            "description": "Only with `malformed`: what is wrong, field by field.",
            "items": {
                "type": "object",
                "required": ["field", "detail"],
                "properties": {
                    "field": {"type": "string", "description": "The field's name, or `body` for the whole."},
                    "detail": {"type": "string"},
                },
            },
        },
        "parts": {
            "type": "object",
            "description": "Only of `/readyz`: each part and what it answers.",
            "additionalProperties": {"type": "string"},
        },
    },
}

#: What the operations that the framework describes may answer with, by their ids.
_PROBLEMS: Final[Mapping[str, tuple[ProblemType, ...]]] = {
    "put_item": (
        MALFORMED,
        UNAUTHORIZED,
        FORBIDDEN,
        STOCK_BELOW_COMMITTED,
        PRECONDITION_FAILED,
        TOO_LARGE,
        NOT_JSON,
        INTERNAL_ERROR,
        UNAVAILABLE,
    ),
    "list_items": (MALFORMED, UNAUTHORIZED, INTERNAL_ERROR, UNAVAILABLE),
    "get_item": (MALFORMED, UNAUTHORIZED, UNKNOWN_ITEM, INTERNAL_ERROR, UNAVAILABLE),
    "readyz": (UNAVAILABLE,),
}
_WITH_KEY: Final = frozenset({"put_item", "list_items", "get_item"})

#: What the server itself may answer to any request, before or instead of the operation: also to one that should have no
#: body and has. `/healthz` is also served when there are too many connections.
_FROM_THE_SERVER: Final = (MALFORMED, REQUEST_TIMEOUT, TOO_LARGE, NOT_JSON, HEADERS_TOO_LARGE, UNAVAILABLE)
#: What is malformed where the operation itself has nothing that could be.
_NO_HTTP: Final = "This is not a request of HTTP/1.1 that can be read."
_SERVED_WHEN_FULL: Final = "healthz"
_EXAMPLE_REQUEST_ID: Final = "0b6c1fd4a9e24c7f8d3a5e61"
_REQUEST_ID_ASKED: Final[Json] = {
    "name": REQUEST_ID,
    "in": "header",
    "required": False,
    "description": "A name for this request, by which it is found in the log: 1 to 64 of A-Za-z0-9._-. Another value "
    "is not taken, and one is made.",
    "schema": {"type": "string"},
    "example": _EXAMPLE_REQUEST_ID,
}
_REQUEST_ID_TOLD: Final[Json] = {
    "description": "The name of the request in the log.",
    "schema": {"type": "string"},
    "example": _EXAMPLE_REQUEST_ID,
}


def describe(app: FastAPI, paths: Mapping[str, Json], schemas: Mapping[str, Json]) -> None:
    """Complete the application's OpenAPI document with these paths and schemas of plain routes.

    Paths are OpenAPI path items; an operation of theirs wins over the framework's. The document is made once, when it
    is first asked for.
    """

    def document() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, paths, schemas)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the framework's documented way to extend it


def problem_responses(*kinds: ProblemType) -> Json:
    """The `responses` for these kinds of errors: kinds of one status share an entry, with an example each."""
    responses: Json = {}
    for kind in kinds:
        status = str(kind.status)
        found = responses.setdefault(
            status,
            {
                "description": "",
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
            },
        )
        line = f"[`{kind.slug}`]({kind.type}): {kind.title}"
        found["description"] = "<br>".join(filter(None, (found["description"], line)))
        found["content"][MEDIA_TYPE]["examples"][kind.slug] = {"value": _example(kind)}
        headers = {}
        if kind.retry_after is not None:
            headers["Retry-After"] = RETRY_AFTER
        if kind is UNAUTHORIZED:
            headers["WWW-Authenticate"] = {"description": "`Bearer`", "schema": {"type": "string"}}
        if headers:
            found.setdefault("headers", {}).update(headers)
    return responses


RETRY_AFTER: Final[Json] = {
    "description": "Seconds to wait before the next request.",
    "schema": {"type": "integer", "minimum": 0},
}


def _example(kind: ProblemType) -> Json:
    example: Json = {
        "type": kind.type,
        "title": kind.title,
        "status": kind.status,
        "detail": Problem(kind).detail,
    }
    if kind is MALFORMED:
        example["detail"] = "quantity: is missing"
        example["errors"] = [{"field": "quantity", "detail": "is missing"}]
    return example


def _document(app: FastAPI, paths: Mapping[str, Json], schemas: Mapping[str, Json]) -> Json:
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
        license_info=app.license_info,
    )
    found: Json = document.setdefault("paths", {})
    for path_item in found.values():
        for operation in path_item.values():
            _complete(operation)
    for path, path_item in paths.items():
        found.setdefault(path, {}).update(deepcopy(path_item))
    for path_item in found.values():
        for operation in path_item.values():
            _add_what_all_have(operation)
    # Purchases first: most readers came for them. Items last: few may change them.
    document["paths"] = dict(
        sorted(
            found.items(),
            key=lambda entry: (entry[0].startswith("/v1/items"), not entry[0].startswith("/v1/")),
        )
    )
    components = document.setdefault("components", {})
    components.setdefault("parameters", {})["RequestId"] = _REQUEST_ID_ASKED
    components.setdefault("headers", {})["RequestId"] = _REQUEST_ID_TOLD
    known = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    known.update({"Problem": _PROBLEM, **schemas})
    components["securitySchemes"] = {
        "bearer": {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key that the operator gave you.",
        }
    }
    return document


def _complete(operation: Json) -> None:
    name = operation["operationId"]
    operation["responses"].pop("422", None)
    operation["responses"].update(problem_responses(*_PROBLEMS.get(name, ())))
    if name in _WITH_KEY:
        operation["security"] = BEARER


def _add_what_all_have(operation: Json) -> None:
    responses = operation["responses"]
    for status, response in problem_responses(*_FROM_THE_SERVER).items():
        if status == str(MALFORMED.status):
            example = response["content"][MEDIA_TYPE]["examples"][MALFORMED.slug]["value"]
            del example["errors"]
            example["detail"] = _NO_HTTP
        if operation["operationId"] != _SERVED_WHEN_FULL or status != str(UNAVAILABLE.status):
            responses.setdefault(status, response)
    operation.setdefault("parameters", []).append({"$ref": "#/components/parameters/RequestId"})
    for response in responses.values():
        # A copy: a description may be shared by several answers.
        response["headers"] = {**response.get("headers", {}), REQUEST_ID: {"$ref": "#/components/headers/RequestId"}}
