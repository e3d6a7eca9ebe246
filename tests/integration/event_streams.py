"""Reading a stream of server-sent events as a browser does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Event:
    """One block of a stream; `comment` and `retry` stand alone."""

    id: str | None = None
    event: str | None = None
    data: Any = None
    retry: int | None = None
    comment: str | None = None


class Stream:
    """A stream that was opened: the answer's status and headers, and its events as they come."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self.reply = reply

    async def next(self) -> Event | None:
        """The next block; None when the stream has ended."""
        lines: list[str] = []
        while line := (await self.reply.content.readline()).decode():
            if line == "\n":
                if lines:
                    return _block(lines)
            else:
                lines.append(line.rstrip("\n"))
        assert not lines, f"the stream broke off in the middle of a block: {lines}"
        return None

    async def next_state(self, *, after: str | None = None) -> Event:
        """The next event with data; comments and `retry` are passed over, and states with the status `after`, whose
        place in the line may be told again."""
        while (event := await self.next()) is not None:
            if event.data is not None and event.data["status"] != after:
                return event
        raise AssertionError("the stream has ended")

    async def rest(self) -> list[Event]:
        """All events until the end."""
        events = []
        while (event := await self.next()) is not None:
            events.append(event)
        return events


@asynccontextmanager
async def open_stream(url: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[Stream]:
    """The stream at this address; the connection is closed with the block. No block waits for more than 20 s."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=20)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, headers=headers) as reply:
        yield Stream(reply)


def _block(lines: list[str]) -> Event:
    if lines[0].startswith(":"):
        (line,) = lines
        return Event(comment=line[1:].strip())
    fields = dict(line.split(": ", 1) for line in lines)
    assert len(fields) == len(lines), lines
    retry = fields.get("retry")
    data = fields.get("data")
    return Event(
        id=fields.get("id"),
        event=fields.get("event"),
        data=None if data is None else json.loads(data),
        retry=None if retry is None else int(retry),
    )
