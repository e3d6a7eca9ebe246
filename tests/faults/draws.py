"""What may be drawn: who buys what, which process fails where, how the provider behaves, how much time passes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.faults.processes_that_fail import Fault, FaultKind
from tests.faults.scripted_provider import (
    AFTER_ASKING,
    AFTER_SENDING,
    BEFORE_ASKING,
    BEFORE_SENDING,
    Behaviour,
)

#: `tea` and `jar` share a lane; holds of `pen` end quickly.
ITEMS = ("tea", "jar", "mug", "pen")
CUSTOMERS = ("ann", "bob", "eve")

#: Where a process that does this can die, and where it can stop: outside of its transactions, which Postgres would end.
_CALL = ("call.before_publish", "call.after_publish")
_RECORD = ("record.before_commit", "record.after_commit", "record.after_publish")
CRASHES = {
    "buy": ("accept.before_commit", "accept.after_commit", "accept.after_publish", *_CALL),
    "cancel": ("cancel.before_commit", "cancel.after_commit", *_CALL),
    "decide": (
        "decide.after_lock",
        "decide.after_forget",
        "decide.before_commit",
        "decide.after_commit",
        "decide.after_publish",
        *_CALL,
    ),
    "charge": (
        "charge.after_claim",
        "charge.after_lock",
        BEFORE_SENDING,
        AFTER_SENDING,
        "charge.after_call",
        *_RECORD,
        *_CALL,
    ),
    "reconcile": ("reconcile.after_claim", BEFORE_ASKING, AFTER_ASKING, "reconcile.after_answer", *_RECORD, *_CALL),
    "sweep": ("sweep.before_commit", "sweep.after_commit", *_CALL),
    "put": _CALL,
}
FREEZES = {
    "buy": ("accept.after_commit",),
    "cancel": ("cancel.after_commit",),
    "decide": ("decide.after_commit", "decide.after_publish"),
    "charge": (
        "charge.after_claim",
        "charge.after_lock",
        BEFORE_SENDING,
        AFTER_SENDING,
        "charge.after_call",
        "record.after_commit",
    ),
    "reconcile": (
        "reconcile.after_claim",
        BEFORE_ASKING,
        AFTER_ASKING,
        "reconcile.after_answer",
        "record.after_commit",
    ),
    "sweep": ("sweep.after_commit",),
    "put": (),
}


def fault(verb: str) -> st.SearchStrategy[Fault]:
    """Something that happens to a process while it does this: the first time that it passes there, or a later one."""
    skips = st.sampled_from((0, 0, 0, 0, 1, 2))
    crash = st.builds(Fault, st.just(FaultKind.CRASH), st.sampled_from(CRASHES[verb]), skips)
    if not FREEZES[verb]:
        return crash
    return crash | st.builds(Fault, st.just(FaultKind.FREEZE), st.sampled_from(FREEZES[verb]), skips)


def faults(verb: str) -> st.SearchStrategy[Fault | None]:
    """The same, or nothing."""
    return st.none() | fault(verb)


SKUS = st.sampled_from(ITEMS)
QUANTITIES = st.sampled_from((1, 1, 1, 2, 3))
#: What one buyer wants: an item, how many, and for whom.
Wanted = tuple[str, int, str]
WANTED: st.SearchStrategy[Wanted] = st.tuples(SKUS, QUANTITIES, st.sampled_from(CUSTOMERS))
ORDERS = st.lists(WANTED, min_size=1, max_size=4)
#: Buyers who come first, and whose lanes are decided, so that there is somebody to charge.
DUE = st.lists(WANTED, max_size=3)
OUTCOMES = st.lists(st.sampled_from(Behaviour), max_size=3)
#: Within a call, past `start_by`, past a call's deadline, past a lock, past the settle window, a recheck, a hold, an
#: hour of doubt.
TIMES = st.sampled_from((1, 6, 6, 16, 25, 25, 35, 65, 65, 90, 90, 320, 1_000, 4_000))
#: Until others take over: mostly past the settle window.
LONG = st.sampled_from((90, 90, 90, 25, 65, 320))
#: Seconds that each of two takes after each of its statements: so they meet in more places than one.
Pace = tuple[float, float]
PACES: st.SearchStrategy[Pace] = st.tuples(*[st.sampled_from((0.0, 0.002, 0.005, 0.012))] * 2)
#: Some sell out at once, some in the course of a sale, some never.
STOCKS = st.sampled_from((0, 1, 2, 4, 8, 30))
CHANGES = st.sampled_from((-2, -1, 1, 2, 3))
INDEX = st.integers(0, 7)


#: Something a process can do, and with what.
Doings = tuple[str, Any]
DOINGS: st.SearchStrategy[Doings] = st.one_of(
    st.tuples(st.just("decide"), SKUS),
    st.tuples(st.just("charge"), OUTCOMES),
    st.tuples(st.just("reconcile"), st.none()),
    st.tuples(st.just("sweep"), st.none()),
    st.tuples(st.just("put"), st.tuples(SKUS, CHANGES)),
    st.tuples(st.just("buy"), ORDERS),
    st.tuples(st.just("cancel"), INDEX),
)
