"""The id of a request, by which its answer, its log lines and those of the caller are found together.

A caller may name it (`X-Request-Id`). Only what is safe in any log is taken; else, and by default, it is made here.
"""

from __future__ import annotations

import random
import re
from typing import Final

from starlette.types import Scope

HEADER: Final = "X-Request-Id"
PATTERN: Final = "^[A-Za-z0-9._-]{1,64}$"

_NAME: Final = HEADER.lower().encode()
_NAMED: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def request_id(scope: Scope) -> str:
    """The id of this request: always the same one, whoever asks first."""
    state = scope.setdefault("state", {})
    found: str | None = state.get("request_id")
    if found is None:
        found = state["request_id"] = _named(scope) or made()
    return found


def made() -> str:
    """A new id. Not a secret: it only has to be another one, so 96 bits from the ordinary generator will do."""
    return f"{random.getrandbits(96):024x}"


def _named(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == _NAME:
            return value.decode("ascii") if _NAMED.fullmatch(value) else None
    return None
