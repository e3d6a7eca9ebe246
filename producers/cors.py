"""Scripts of other origins (CORS, as the Fetch standard has it): which of them may read the public status.

Nothing else of the API is for browsers: every other path needs an API key, which has no place in one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Scope

#: The paths whose answers may be read.
_PUBLIC: Final = "/v1/status/"
#: Seconds a browser may keep the answer to its preflight: two hours are the most that browsers do.
_PREFLIGHT_KEPT: Final = "7200"


class Cors:
    """Adds to the answers of the public paths, errors included, what lets scripts of these origins read them."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)

    def add_fields(self, scope: Scope, answer: MutableHeaders) -> None:
        """Add the fields to the answer to this request, if its path is a public one."""
        if not scope["path"].startswith(_PUBLIC):
            return
        asked = Headers(scope=scope)
        origin = asked.get("Origin")
        # Also where no origin was named: caches must not give that answer to one that names itself.
        answer.add_vary_header("Origin")
        if origin not in self._origins:
            return
        answer["Access-Control-Allow-Origin"] = origin or ""
        answer["Access-Control-Expose-Headers"] = "ETag, Retry-After, Preference-Applied"
        if scope["method"] == "OPTIONS" and "Access-Control-Request-Method" in asked:
            answer["Access-Control-Allow-Methods"] = "GET, HEAD"
            answer["Access-Control-Allow-Headers"] = "If-None-Match, Last-Event-ID, Prefer"
            answer["Access-Control-Max-Age"] = _PREFLIGHT_KEPT
