"""What every answer tells a browser, whoever made the answer: believe the content type, frame nothing, load nothing.

Strict-Transport-Security is not among them: it is for the proxy that speaks TLS, and knows for how long it will.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

RawHeaders = Iterable[tuple[bytes, bytes]]

#: For an answer that is data: a browser that shows it as a page loads nothing, runs nothing and is not framed.
DATA_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"

_ALWAYS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # For browsers that do not know frame-ancestors.
    (b"x-frame-options", b"DENY"),
    # Other sites may not embed an answer. Scripts of the origins of `producers.cors` ask for it, and may read it.
    (b"cross-origin-resource-policy", b"same-origin"),
)
#: Unless the answer has its own.
_POLICY: Final = (b"content-security-policy", DATA_POLICY.encode())
_NOT_KEPT: Final = (b"cache-control", b"no-store")


def completed(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """These headers of an answer, names in lower case, and those that every answer has.

    A policy and a Cache-Control of its own stay. An answer that does not say how long it may be kept, as no error does,
    is not kept.
    """
    complete = [*headers, *_ALWAYS]
    has_policy = kept = False
    for name, _ in complete:
        if name == b"cache-control":
            kept = True
        elif name == b"content-security-policy":
            has_policy = True
    if not has_policy:
        complete.append(_POLICY)
    if not kept:
        complete.append(_NOT_KEPT)
    return complete
