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
    INTERNAL_ERROR,
    MALFORMED,
    MEDIA_TYPE,
    NOT_JSON,
    STOCK_BELOW_COMMITTED,
    TOO_LARGE,
    UNAUTHORIZED,
    UNAVAILABLE,
    UNKNOWN_ITEM,
    Problem,
    ProblemType,
)

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
        TOO_LARGE,
        NOT_JSON,
        INTERNAL_ERROR,
        UNAVAILABLE,
    ),
    "get_item": (MALFORMED, UNAUTHORIZED, UNKNOWN_ITEM, INTERNAL_ERROR, UNAVAILABLE),
    "readyz": (UNAVAILABLE,),
}
_WITH_KEY: Final = frozenset({"put_item", "get_item"})


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
    # Purchases first: most readers came for them. Items last: few may change them.
    document["paths"] = dict(
        sorted(
            found.items(),
            key=lambda entry: (entry[0].startswith("/v1/items"), not entry[0].startswith("/v1/")),
        )
    )
    components = document.setdefault("components", {})
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
