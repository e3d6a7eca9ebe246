"""The path of a request as a log may have it: what we routed by, and nothing that a client made up.

Clients put things into paths that do not belong there, a payment token for one. So a part of a path that a route takes
as a value is shown only when it is known for what it is; otherwise the name it has in the route stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import compile_path
from starlette.types import Scope

_PURCHASE_ID: Final = re.compile(r"[0-9a-f]{32}")


class RoutedPaths:
    """The paths of one application. Its routes are looked at when first needed, as they are complete by then."""

    def __init__(self) -> None:
        self._patterns: list[tuple[str, re.Pattern[str]]] | None = None

    def of(self, scope: Scope, status: int | None) -> str | None:
        """The path of this request, which was answered with `status`; None where no route has it.

        `/v1/purchases/9f86…` with a purchase's id; `/v1/items/sku-1` when there is such an item, else
        `/v1/items/{sku}`.
        """
        if "app" not in scope:
            return None
        # A request may be answered before it comes to a route, or be routed on a copy of its scope. Only of one that
        # was routed on this scope and found something it is known that what stands under a name is that name's.
        found = "path_params" in scope and status is not None and status < 400
        if self._patterns is None:
            self._patterns = _patterns(scope["app"])
        for template, pattern in self._patterns:
            if match := pattern.match(scope["path"]):
                return _filled(template, match.groupdict(), found=found)
        return None


def _patterns(app: FastAPI) -> list[tuple[str, re.Pattern[str]]]:
    templates = dict.fromkeys(context.path for context in iter_route_contexts(app.routes) if context.path)
    return [(template, compile_path(template)[0]) for template in templates]


def _filled(template: str, values: Mapping[str, Any], *, found: bool) -> str:
    shown = {name: _shown(name, str(value), found) for name, value in values.items()}
    return template.format_map(shown) if shown else template


def _shown(name: str, value: str, found: bool) -> str:
    return value if found or _PURCHASE_ID.fullmatch(value) else f"{{{name}}}"
