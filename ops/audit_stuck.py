"""Nothing stuck: who should have moved, and surely has not.

A purchase that is late is not stuck yet: it may stand in a line that moves. So there are two looks. The first finds,
line by line and in the order in which its workers take it, those who are late by more than the bound below. If there
are any, a second look follows a few seconds later. Stuck are those at the head of their line who have not moved in
between; whoever stands behind one that moved is only waiting for its turn.

    line                    taken in the order of      late after
    ──────────────────────  ─────────────────────────  ──────────────────────────────────────────────────────────────
    a lane's queue          seq                        `round` from being accepted
    an item's waitlist      its head                   `round` from the last thing that moved the item, if its stock
                                                       serves the head now, or never will
    ended holds             seq                        `round` from the hold's end
    calls without outcome   seq                        `round` from the call deadline
    due holds               due time                   `claims` from being due, and nobody claimed any for as long
    questions, rechecks     when to ask                `questions` from when to ask
    doubts                  each for itself            `doubt` from the doubt's beginning

Why due holds are judged by the claims of all. While the provider is out, the breaker lets one call through at a time,
and thousands stay due without anybody's fault, until their holds run out. But then, too, somebody is claimed every half
minute. Only when nothing is claimed at all are the due ones stuck. One that alone is passed over is found when its hold
has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, takewhile
from types import MappingProxyType
from uuid import UUID

from sqlalchemy import RowMapping, TextClause, text

from shared.settings import Settings

#: Runs one statement in a transaction of its own, with these values.
Read = Callable[..., Awaitable[Sequence[RowMapping]]]

#: What a healthy installation does within a second or two gets this long on top of its own timeouts: overload and a
#: machine that starves it are no drift.
_PATIENCE = 60.0
#: Due holds get longer: the breaker's longest pause (30 s), Celery's consumers that come back to a broker after up to
#: 30 s, a Redis that was away for a while.
_CLAIMS_PATIENCE = 300.0
#: Rechecks of one round, asked one after another: when the provider is silent, each takes a whole CALL_TIMEOUT.
_QUESTIONS_PER_ROUND = 50
#: The longest pause between two questions about the same purchase.
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """From when on somebody is late, in seconds."""

    round: float
    claims: float
    questions: float
    doubt: float
    #: Seconds between the two looks: a lost call and a frozen holder of a lane's lock are over by then.
    look_again: float

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        """As these settings make them: a bound is never shorter than what the installation itself waits for."""
        recovery = (
            settings.sweep_every + settings.called_ttl + settings.lock_timeout + settings.idle_in_transaction_timeout
        )
        round_ = _PATIENCE + recovery + settings.statement_timeout
        questions = round_ + _QUESTIONS_PER_ROUND * settings.call_timeout
        settled = max(settings.doubt_patience, settings.overdue_after + settings.settle_window)
        return cls(
            round=round_,
            claims=_CLAIMS_PATIENCE + settings.overdue_after + recovery,
            questions=questions,
            doubt=settled + _LONGEST_PAUSE + questions,
            look_again=recovery,
        )


@dataclass(frozen=True, slots=True)
class Stuck:
    """One purchase (32 hex digits) that surely should have moved: what it waits for, and since when."""

    purchase: str
    detail: str


async def find_stuck(read: Read, settings: Settings) -> list[Stuck]:
    """Whoever is stuck. Takes as long as the statements when nobody is late, and `look_again` longer otherwise."""
    bounds = Bounds.of(settings)
    first = {line: await _look(read, line, bounds) for line in LINES}
    if not any(first.values()):
        return []
    await asyncio.sleep(bounds.look_again)
    stuck: dict[str, Stuck] = {}
    for line, rows in first.items():
        if rows:
            for row in _unmoved(rows, await _look(read, line, bounds)):
                purchase: UUID = row["id"]
                stuck.setdefault(purchase.hex, Stuck(purchase.hex, f"{line}: {row['detail']}"))
    return list(stuck.values())


def _unmoved(before: Sequence[RowMapping], after: Sequence[RowMapping]) -> Iterator[RowMapping]:
    """Of each line, those before the first that moved."""
    still = {_mark(row) for row in after}
    for _, line in groupby(before, key=lambda row: row["line"]):
        yield from takewhile(lambda row: _mark(row) in still, line)


async def _look(read: Read, line: str, bounds: Bounds) -> Sequence[RowMapping]:
    statement = LINES[line]
    named = statement.compile().params
    return await read(statement, **{name: value for name, value in asdict(bounds).items() if name in named})


def _mark(row: RowMapping) -> tuple[object, object]:
    """What changes when it moves."""
    return row["id"], row["mark"]


_QUEUED = text("""
SELECT p.lane AS line, p.id, CAST(p.rev AS text) AS mark,
       format('in lane %s since %s', p.lane, p.accepted_at) AS detail
FROM fairlane.purchases p
WHERE p.status = 'queued' AND p.accepted_at < now() - make_interval(secs => :round)
ORDER BY p.lane, p.seq
""")

_WAITLISTED = text("""
WITH RECURSIVE heads AS (
    (SELECT lane, item, id, rev, quantity, accepted_at FROM fairlane.purchases
     WHERE status = 'waitlisted' ORDER BY lane, item, seq LIMIT 1)
    UNION ALL
    SELECT next.* FROM heads h CROSS JOIN LATERAL (
        SELECT lane, item, id, rev, quantity, accepted_at FROM fairlane.purchases
        WHERE status = 'waitlisted' AND (lane, item) > (h.lane, h.item) ORDER BY lane, item, seq LIMIT 1
    ) next
), movable AS MATERIALIZED (
    SELECT h.*, i.rev AS item_rev, i.available, greatest(h.accepted_at, i.updated_at) AS since
    FROM heads h JOIN fairlane.items i ON i.sku = h.item
    WHERE (h.quantity <= i.available OR h.quantity > i.available + i.unpaid OR NOT i.waitlist)
      AND greatest(h.accepted_at, i.updated_at) < now() - make_interval(secs => :round)
), moved AS (
    SELECT p.item, max(greatest(p.decided_at, p.finished_at)) AS last
    FROM fairlane.purchases p WHERE p.item IN (SELECT item FROM movable) GROUP BY p.item
)
SELECT m.item AS line, m.id, format('%s/%s', m.rev, m.item_rev) AS mark,
       format('first for %s of %s, %s available since %s', m.quantity, m.item, m.available,
              greatest(m.since, moved.last)) AS detail
FROM movable m JOIN moved USING (item)
WHERE greatest(m.since, moved.last) < now() - make_interval(secs => :round)
ORDER BY m.lane, m.item
""")
"""Whatever moves an item's stock or the head of its waitlist leaves its time: the item's terms in `updated_at`, stock
given in `decided_at`, holds that ended in `finished_at`."""

_ENDED_HOLDS = text("""
SELECT 0 AS line, p.id, CAST(p.rev AS text) AS mark, format('ended at %s', p.expires_at) AS detail
FROM fairlane.purchases p
WHERE CASE WHEN p.status = 'reserved' THEN true ELSE false END AND p.expires_at < now() - make_interval(secs => :round)
  AND p.due_at < now() - make_interval(secs => :round)
ORDER BY p.seq
""")
"""`due_at` as well: one that came back from its call after its hold had ended was not in this line until then, and its
`due_at` lies after that."""

_OVERDUE_CALLS = text("""
SELECT 0 AS line, p.id, CAST(p.rev AS text) AS mark, format('its deadline was %s', p.call_deadline) AS detail
FROM fairlane.purchases p
WHERE p.status = 'charging' AND p.call_deadline < now() - make_interval(secs => :round)
ORDER BY p.seq
""")

_DUE_HOLDS = text("""
SELECT 0 AS line, p.id, CAST(p.rev AS text) AS mark,
       format('to be charged since %s, and nothing was claimed meanwhile', p.due_at) AS detail
FROM fairlane.purchases p
WHERE p.status = 'reserved' AND p.due_at < now() - make_interval(secs => :claims) AND p.expires_at > now()
  AND NOT EXISTS (
    SELECT FROM fairlane.charge_attempts a WHERE a.claimed_at > now() - make_interval(secs => :claims))
ORDER BY p.due_at, p.seq
""")

_QUESTIONS = text("""
SELECT 0 AS line, p.id, CAST(p.ask_at AS text) AS mark, format('the provider was to be asked at %s', p.ask_at) AS detail
FROM fairlane.purchases p
WHERE p.status = 'in_doubt' AND p.ask_at < now() - make_interval(secs => :questions)
ORDER BY p.ask_at, p.seq
""")

_RECHECKS = text("""
SELECT 0 AS line, a.purchase_id AS id, format('%s/%s', a.attempt, a.rechecks) AS mark,
       format('the provider was to be asked again about attempt %s at %s', a.attempt, a.recheck_at) AS detail
FROM fairlane.charge_attempts a
WHERE a.recheck_at < now() - make_interval(secs => :questions)
ORDER BY a.recheck_at
""")

_DOUBTS = text("""
SELECT p.seq AS line, p.id, CAST(p.rev AS text) AS mark, format('since %s', p.doubt_since) AS detail
FROM fairlane.purchases p
WHERE p.status = 'in_doubt' AND p.doubt_since < now() - make_interval(secs => :doubt)
ORDER BY p.seq
""")
"""In doubt beyond all patience, although it is asked about: it should be with an operator."""

LINES: Mapping[str, TextClause] = MappingProxyType(
    {
        "queued": _QUEUED,
        "waitlisted": _WAITLISTED,
        "hold not ended": _ENDED_HOLDS,
        "call without an outcome": _OVERDUE_CALLS,
        "due": _DUE_HOLDS,
        "not asked about": _QUESTIONS,
        "not asked about again": _RECHECKS,
        "in doubt": _DOUBTS,
    }
)
"""Who is late, line by line, in the order in which each line is taken."""
