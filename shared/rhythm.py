"""A rhythm: at most once in so many seconds. Whoever comes later than that waits for nothing.

Work that is done by the batch costs as much for one as for twenty: a few round trips, a commit. Where a little arrives
all the time, whoever does it as often as possible uses a whole machine for small batches, and everybody waits for the
processor. With a rhythm there is a pause in which more comes together. An idle system knows no pause.
"""

from __future__ import annotations

from asyncio import sleep
from time import monotonic


class Rhythm:
    """Says when the next time has come. On one event loop; whoever asks at once takes turns."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    async def beat(self) -> None:
        """Wait until `seconds` have passed since the last beat; not at all if they have."""
        now = monotonic()
        at = max(now, self._next)
        self._next = at + self._seconds
        if at > now:
            await sleep(at - now)
