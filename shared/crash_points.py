"""Named places where a process may be made to die, one before and one after each effect. For tests; off unless armed.

An unarmed point is one look at a variable. `FAIRLANE_CRASH_AT=decide.before_commit` arms one in a process started
with it (`arm_from_environment`): the process kills itself there with SIGKILL, as a crash would, with no cleanup. Tests
in one process arm it with an action of their own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POINTS = frozenset(
    {
        "accept.before_commit",
        "accept.after_commit",
        "accept.after_publish",
        "call.before_publish",
        "call.after_publish",
        "decide.after_lock",
        "decide.after_forget",
        "decide.before_commit",
        "decide.after_commit",
        "decide.after_publish",
        "charge.after_claim",
        "charge.after_lock",
        "charge.after_call",
        "record.before_commit",
        "record.after_commit",
        "record.after_publish",
        "reconcile.after_claim",
        "reconcile.after_answer",
        "sweep.before_commit",
        "sweep.after_commit",
    }
)
"""Every point. A name that is not here cannot be armed, and a test checks that each is a place in the code."""

_action: Callable[[str], None] | None = None


def crash_point(name: str) -> None:
    """A place where a crash is interesting."""
    if _action is not None:
        _action(name)


@contextmanager
def armed(action: Callable[[str], None]) -> Iterator[None]:
    """While this lasts, `action` is called with the name of every point that is passed."""
    global _action
    before, _action = _action, action
    try:
        yield
    finally:
        _action = before


def arm_from_environment() -> None:
    """Arm the point that `FAIRLANE_CRASH_AT` names, if it names one: `name`, or `name:3` for the third time there."""
    wanted = os.environ.get("FAIRLANE_CRASH_AT")
    if not wanted:
        return
    name, _, times = wanted.partition(":")
    if name not in POINTS:
        raise SystemExit(f"fairlane: FAIRLANE_CRASH_AT: there is no point {name}")
    left = int(times or 1)

    def die(reached: str) -> None:
        nonlocal left
        if reached == name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    global _action
    _action = die
