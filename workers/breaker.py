"""The circuit breaker: when calls fail as a group, claims pause, and one call at a time finds out when they may go on.

Pure: it is told outcomes and the time, and says how many calls may be claimed. One per charging process; a provider's
outage is noticed by each within a few calls.

    closed ── most of the last calls failed, or one that needs an operator ──▶ open ── its pause is over ──▶ probing
       ▲                                                                        ▲                               │
       └──────────────────────────── the probe succeeded ───────────────────────┼── the probe failed ───────────┘
                                                                                (the pause doubles)
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

#: Calls looked back on. Fewer would open on a coincidence; more would send more calls into an outage.
_WINDOW = 20
#: Failed calls among them that open the breaker: a healthy provider fails one in hundreds.
_FAILURES = 10
#: First pause in seconds, doubled with every failed probe up to the last.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class Circuit(StrEnum):
    """Whether calls may be made."""

    CLOSED = "closed"  #: as many as there are slots
    OPEN = "open"  #: none until the pause is over
    PROBING = "probing"  #: one is under way; none until its outcome is known


class Breaker:
    """Counts outcomes and says how many calls may be claimed. Times in seconds on one monotonic scale."""

    def __init__(self) -> None:
        self.circuit = Circuit.CLOSED
        self._recent: deque[bool] = deque(maxlen=_WINDOW)
        self._pause = _FIRST_PAUSE
        self._opened_at = 0.0

    def allows(self, slots: int, now: float) -> int:
        """How many of these free slots may be used for claims now."""
        match self.circuit:
            case Circuit.CLOSED:
                return slots
            case Circuit.OPEN if now >= self._opened_at + self._pause:
                return min(slots, 1)
            case _:
                return 0

    def claimed(self) -> None:
        """Calls it allowed were claimed. If it was open, that was the probe."""
        if self.circuit is Circuit.OPEN:
            self.circuit = Circuit.PROBING

    def ended(self) -> None:
        """A call is over, whatever came of it. A probe that told nothing (it was not sent) leaves the next to probe."""
        if self.circuit is Circuit.PROBING:
            self.circuit = Circuit.OPEN

    def succeeded(self) -> None:
        """The provider answered with a result, whichever: it works."""
        self._recent.append(True)
        if self.circuit is not Circuit.CLOSED:
            self.circuit = Circuit.CLOSED
            self._recent.clear()
            self._pause = _FIRST_PAUSE

    def failed(self, now: float, *, alert: bool = False) -> bool:
        """A call was not executed, or nobody knows. `alert`: no retry helps until somebody acts.

        Returns whether it opened now.
        """
        self._recent.append(False)
        match self.circuit:
            case Circuit.PROBING:
                self._pause = min(self._pause * 2, _LONGEST_PAUSE)
                self.circuit, self._opened_at = Circuit.OPEN, now
                return False
            case Circuit.CLOSED if alert or self._recent.count(False) >= _FAILURES:
                self.circuit, self._opened_at = Circuit.OPEN, now
                return True
            case _:
                return False
