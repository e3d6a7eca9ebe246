"""What a client says it has seen already: If-None-Match (RFC 9110) and Last-Event-ID (server-sent events)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

#: One entity tag of a list; comparison is weak, so W/ says nothing. Without quotes it is no entity tag.
_TAG: Final = re.compile(r'(?:^|[,\s])(?:W/)?("[^"]*")')
#: What our own tags look like: the revision comes first, see `producers.shown.etag_of`. Nine digits are more than any
#: purchase has revisions.
_OURS: Final = re.compile(r'"([0-9]{1,9})-[0-9]+"')
_EVENT_ID: Final = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Seen:
    """The answers a client has: their entity tags (`*`: any), and the newest revision among them (0: none)."""

    tags: frozenset[str]
    revision: int

    def has(self, tag: str) -> bool:
        """Whether the answer with this tag would tell the client nothing new."""
        return "*" in self.tags or tag.removeprefix("W/") in self.tags

    def misses(self, revision: int) -> bool:
        """Whether the client named what it has seen, and this revision is not it.

        A place in the line that moved on is no such thing: a client that waits again and again would be answered at
        once each time.
        """
        return bool(self.tags) and "*" not in self.tags and self.revision != revision


def seen_by(request: Request) -> Seen:
    """What the If-None-Match headers of a request name. A header that has not their form names nothing."""
    header = ",".join(request.headers.getlist("If-None-Match"))
    if not header:
        return Seen(frozenset(), 0)
    tags = frozenset(_TAG.findall(header))
    if "*" in (part.strip() for part in header.split(",")):
        tags |= {"*"}
    return Seen(tags, max((int(ours[1]) for ours in map(_OURS.fullmatch, tags) if ours), default=0))


def last_event(request: Request) -> int:
    """The revision named by Last-Event-ID, 0 if there is none."""
    found = _EVENT_ID.fullmatch(request.headers.get("Last-Event-ID", ""))
    return int(found[0]) if found else 0
