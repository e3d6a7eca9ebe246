"""Named places where a process may be made to die or to freeze, one before and one after each effect. For tests; off
unless armed.

An unarmed point is one look at a variable. A process started with `FAIRLANE_CRASH_AT` arms itself
(`arm_from_environment`). There it kills itself with SIGKILL, as a crash would, with no cleanup; or it stops itself with
SIGSTOP, as if its machine had been suspended, until somebody sends SIGCONT.

    FAIRLANE_CRASH_AT=decide.before_commit      die there
    FAIRLANE_CRASH_AT=decide.before_commit:3    die there the third time
    FAIRLANE_CRASH_AT=charge.after_lock:1:stop  freeze there the first time
    FAIRLANE_CRASH_AT=/some/folder/             die or freeze where a file in this folder says so

The last one arms points while the process runs: a file named as the point, with `kill` or `stop` in it. Whoever passes
the point first takes the file away, by giving it its own process id as a suffix, and obeys. So one process dies once,
also if it is one of many children of the process that was started.

Tests in one process arm all points with an action of their own (`armed`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POINTS = frozenset(
    {
        "accept.before_commit",
        "accept.after_commit",
        "accept.after_publish",
        "call.before_publish",
        "call.after_publish",
        "cancel.before_commit",
        "cancel.after_commit",
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

ACTIONS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
"""What may happen at a point."""

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
    """Arm what `FAIRLANE_CRASH_AT` names, if it is set. A name that does not exist ends the process with one line."""
    global _action
    wanted = os.environ.get("FAIRLANE_CRASH_AT")
    if not wanted:
        return
    _action = _where_files_say_so(Path(wanted)) if os.sep in wanted else _at_one_point(wanted)


def _at_one_point(wanted: str) -> Callable[[str], None]:
    name, _, rest = wanted.partition(":")
    times, _, action = rest.partition(":")
    if name not in POINTS:
        raise SystemExit(f"fairlane: FAIRLANE_CRASH_AT: there is no point {name}")
    if not (times or "1").isdecimal() or (action or "kill") not in ACTIONS:
        raise SystemExit(f"fairlane: FAIRLANE_CRASH_AT: {wanted} is not point, point:times or point:times:kill|stop")
    left = int(times or 1)

    def act(reached: str) -> None:
        nonlocal left
        if reached == name:
            left -= 1
            if left == 0:
                # To this thread, not to the process: another one of its threads would take it a moment later.
                signal.raise_signal(ACTIONS[action or "kill"])

    return act


def _where_files_say_so(folder: Path) -> Callable[[str], None]:
    def act(reached: str) -> None:
        taken = folder / f"{reached}.{os.getpid()}"
        try:
            (folder / reached).rename(taken)
        except FileNotFoundError:
            return
        # As above: not one step further.
        signal.raise_signal(ACTIONS[taken.read_text().strip()])

    return act
