"""What schemathesis must know of this API beside its description; read by its process, see `test_description`."""

from __future__ import annotations

import unicodedata
from typing import Any

import schemathesis


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """Leave out what JSON Schema takes for something else than this API: 1.0, which is a whole number there, and
    characters of a later Unicode than Python's, which are letters there and nothing here.
    """
    if not isinstance(body, dict):
        return True
    return not any(
        (isinstance(value, float) and value.is_integer())
        or (isinstance(value, str) and any(unicodedata.category(character) == "Cn" for character in value))
        for value in body.values()
    )
