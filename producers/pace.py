"""How fast lanes move: learned from the watermarks that status reads bring along anyway. Pure: the clock is given.

A lane's pace is how much its watermark (`decided through`) rises in a second. Like a position, it is counted in `seq`,
which numbers the purchases of all lanes; so one divided by the other is seconds, whatever share of the purchases the
lane has.

Only reads of purchases that wait may be observed: the watermark of a lane in which nobody waits stands still and says
nothing. When such a lane gets its next purchase, its watermark leaps over all that the other lanes took meanwhile,
which is no pace either. So what is observed counts from the first rise on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp
from typing import Final

#: Seconds between two samples. A lane is decided in batches: in less time, a sample is one batch or none.
_SAMPLE_AFTER: Final = 0.5
#: Seconds after which a sample has lost two thirds of its weight: a pace of long ago says little, one of a single
#: second jumps.
_WINDOW: Final = 10.0
#: Seconds without an observation after which a lane is observed anew: perhaps nobody waited meanwhile. With one poll
#: in 2 s, a single client suffices to keep it.
_FORGET_AFTER: Final = 5.0
#: Seconds beyond which an estimate is no use: a day, as long as no sale lasts.
_LONGEST: Final = 86_400


@dataclass(slots=True)
class _Lane:
    decided_through: int
    #: When the last sample ended, and when the lane was last seen (monotonic seconds).
    sampled_at: float
    seen_at: float
    moved: bool = False
    rate: float | None = None


class Pace:
    """The pace of every lane, as far as this process has seen it."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}

    def observe(self, lane: int, decided_through: int, now: float) -> None:
        """Somebody waits in this lane, and this is its watermark. `now` is monotonic, in seconds."""
        seen = self._lanes.get(lane)
        if seen is None or now - seen.seen_at > _FORGET_AFTER:
            self._lanes[lane] = _Lane(decided_through, now, now)
            return
        rise = decided_through - seen.decided_through
        if rise < 0:
            # It comes late. If it is the truth (a database was restored), the lane is soon forgotten, and learned anew.
            return
        seen.seen_at = now
        if not seen.moved:
            if rise:
                seen.moved, seen.decided_through, seen.sampled_at = True, decided_through, now
            return
        elapsed = now - seen.sampled_at
        if elapsed < _SAMPLE_AFTER:
            return
        sample = rise / elapsed
        old = exp(-elapsed / _WINDOW)
        seen.rate = sample if seen.rate is None else old * seen.rate + (1 - old) * sample
        seen.decided_through += rise
        seen.sampled_at = now

    def seconds(self, lane: int, seq: int, decided_through: int | None, now: float) -> int | None:
        """Estimated seconds until this place in the lane is decided, at least 1; None while it cannot be told.

        Without a watermark, the one seen last is taken, if that was just now.
        """
        seen = self._lanes.get(lane)
        if seen is None or not seen.rate or now - seen.seen_at > _FORGET_AFTER:
            return None
        position = seq - (seen.decided_through if decided_through is None else decided_through)
        seconds = position / seen.rate
        return max(1, ceil(seconds)) if seconds <= _LONGEST else None
