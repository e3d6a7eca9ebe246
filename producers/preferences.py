"""The header Prefer (RFC 7240), of which one preference is of interest here: `wait`, in seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

#: Seconds a request may be held. Proxies and load balancers commonly hang up after 60 s without an answer, some
#: after 30; a request that begins its wait late must still be answered before that.
LONGEST_WAIT: Final = 30

_SECONDS: Final = re.compile(r'"[0-9]+"|[0-9]+')


def wait_seconds(headers: Sequence[str]) -> int | None:
    """How long the client asks to wait, at most `LONGEST_WAIT`; None if it does not, or not with a number.

    `headers` are the values of all Prefer headers of a request. As RFC 7240 has it, the first `wait` counts.
    """
    for preference in (preference for header in headers for preference in _split(header, ",")):
        name, _, value = next(_split(preference, ";")).partition("=")
        if name.strip().lower() == "wait":
            if not _SECONDS.fullmatch(value.strip()):
                return None
            digits = value.strip().strip('"').lstrip("0") or "0"
            # By its length first: a number of thousands of digits is work for nothing.
            return min(LONGEST_WAIT, int(digits)) if len(digits) < 9 else LONGEST_WAIT
    return None


def _split(text: str, separator: str) -> Iterator[str]:
    """The parts between separators; one inside a quoted string separates nothing."""
    if '"' not in text:
        yield from text.split(separator)
        return
    begin, quoted, escaped = 0, False, False
    for place, character in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character == separator and not quoted:
            yield text[begin:place]
            begin = place + 1
    yield text[begin:]
