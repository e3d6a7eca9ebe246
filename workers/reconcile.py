"""Reconciliation: finding out what became of calls that nobody has an outcome of.

A purchase is in doubt when its call may or may not have been executed. It keeps its stock, and it is not charged again
while that is unknown. What the provider says settles it:

    asked ──┬─ one succeeded charge ───────────────────────▶ confirmed
            ├─ only declined ones ─────────────────────────▶ declined
            ├─ more than one succeeded ────────────────────▶ needs_review, and an alert
            ├─ none, asked before the settle window ended ─▶ asked again when it has ended
            ├─ none, asked after it ───────────────────────▶ never charged: another attempt; declined after five
            └─ no answer ──────────────────────────────────▶ asked again, patiently, for an hour; then needs_review

The settle window. A call that is in doubt may still be on its way: "not found" proves nothing yet. It proves something
once the call's deadline is over by `SETTLE_WINDOW`, and only if the question was *sent* after that. The narrow lock is
taken around the question, so that no call for the purchase starts between question and record.

What remains is a provider that executes a call later than that, or finds what it said it had not. Attempts that were
"never charged" are therefore asked about again after 5 minutes, 1 hour and 24 hours; a charge found then is an alert.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import RowMapping
from sqlalchemy.ext.asyncio import AsyncEngine

from shared import keys
from shared.crash_points import crash_point
from shared.database import transaction
from shared.narrow_lock import Lock, NarrowLock
from shared.settings import Settings
from shared.statements import recover as sql
from workers.gateways import ChargeRecord, Confirmed, Declined, Gateway, GatewayUnavailable
from workers.record import NeedsReview, NotCharged, Recorded, RecordedOutcome, Recorder, Result

log = structlog.get_logger()

#: Questions per round: a provider in trouble is not helped by thousands at once.
_BATCH = 50
#: A question that got no answer is repeated after this share of the time spent in doubt, within the bounds below: often
#: at first, once a minute at last.
_PATIENCE, _SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 1.0, 60.0
#: The longest until a question is tried again that found the narrow lock taken or Redis away. Short, as such a lock is
#: mostly that of a worker that died, and runs out by itself.
_LONGEST_PAUSE_WHILE_LOCKED = 5.0


@dataclass(frozen=True, slots=True)
class Postponed:
    """Nothing can be said yet; ask again after `pause` seconds."""

    pause: float


Answer = RecordedOutcome | Postponed


def judge(
    records: Sequence[ChargeRecord] | None,
    *,
    doubted: float,
    settles_in: float,
    settings: Settings,
    charged_in_vain: int,
) -> Answer:
    """What the provider's records mean for a purchase in doubt. Pure.

    `records` is None when there was no trustworthy answer. `doubted` is how long it has been in doubt, `settles_in`
    how many seconds remained of the settle window when the question was sent, and `charged_in_vain` how many of its
    attempts were never charged already.
    """
    pause = _patience(doubted)
    if records is None:
        return NeedsReview("provider_silent") if doubted >= settings.doubt_patience else Postponed(pause)
    succeeded = [record for record in records if record.status == "succeeded"]
    if len(succeeded) > 1:
        return NeedsReview("charged_twice")
    if succeeded:
        return Confirmed(succeeded[0].id)
    if any(record.status != "declined" for record in records):
        # Neither succeeded nor declined: the provider is still at it.
        return NeedsReview("provider_undecided") if doubted >= settings.doubt_patience else Postponed(pause)
    if records:
        return Declined("declined", records[-1].id)
    if settles_in > 0:
        return Postponed(max(min(pause, settles_in), min(settles_in, _SHORTEST_PAUSE)))
    again = settings.not_charged == "retry" and charged_in_vain + 1 < settings.never_charged_limit
    return NotCharged(again=again)


def _patience(doubted: float) -> float:
    """Seconds until the next question about a purchase that has been in doubt for this long."""
    return min(max(doubted * _PATIENCE, _SHORTEST_PAUSE), _LONGEST_PAUSE)


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What one claim check led to: the result of the task `purchases.reconcile`."""

    asked: int = 0
    settled: int = 0
    postponed: int = 0
    rechecked: int = 0
    found_late: int = 0

    def as_result(self) -> dict[str, Any]:
        """As Celery shows it."""
        return {
            "asked": self.asked,
            "settled": self.settled,
            "postponed": self.postponed,
            "rechecked": self.rechecked,
            "found_late": self.found_late,
        }


@dataclass(frozen=True, slots=True)
class _Question:
    """One purchase to ask about, as its row stood when the question was claimed."""

    purchase: str
    fence: int
    attempt: int
    doubted: float
    settles_in: float
    charged_in_vain: int
    lock: Lock


class Reconciler:
    """Asks the provider about purchases in doubt, and again about attempts it said it never charged."""

    def __init__(
        self,
        engine: AsyncEngine,
        redis: Redis,
        gateway: Gateway,
        recorder: Recorder,
        settings: Settings,
        worker: str,
    ) -> None:
        self._engine = engine
        self._locks = NarrowLock(redis, settings.charge_lock_ttl, recorder.lock_metrics)
        self._gateway = gateway
        self._recorder = recorder
        self._settings = settings
        self._worker = worker

    async def run_once(self) -> Reconciled:
        """One round: at most `_BATCH` questions, and as many later checks."""
        questions = await self._claim()
        crash_point("reconcile.after_claim")
        ours = await self._take_locks(questions)
        try:
            answers = await asyncio.gather(*(self._ask(question) for question in ours))
            crash_point("reconcile.after_answer")
            settled, still_open = await self._settle(questions, dict(zip(ours, answers, strict=True)))
            await self._postpone(still_open)
        finally:
            self._locks.abandon([question.lock for question in ours])
        rechecked = await self._recheck()
        await self._locks.tell()
        return Reconciled(len(ours), settled, len(still_open), **rechecked)

    async def _settle(
        self, questions: Sequence[_Question], answers: Mapping[_Question, Answer]
    ) -> tuple[int, list[tuple[_Question, float]]]:
        """Record the answers that settle something. Returns how many did, and the questions that stay open, each with
        the pause until it is asked again: no answer yet, its lock not obtained, or its purchase locked by somebody."""
        results = [
            Result(question.purchase, question.fence, question.attempt, question.lock, answer)
            for question, answer in answers.items()
            if not isinstance(answer, Postponed)
        ]
        recorded = set()
        for result, became in zip(results, await self._recorder.record(results) if results else [], strict=True):
            if became is Recorded.LATER:
                continue
            recorded.add(result.purchase)
            if isinstance(result.outcome, NeedsReview):
                log.error("purchase_needs_review", purchase=result.purchase, reason=result.outcome.reason)
        still_open = []
        for question in questions:
            if question.purchase not in recorded:
                answer = answers.get(question)
                blocked = min(_patience(question.doubted), _LONGEST_PAUSE_WHILE_LOCKED)
                still_open.append((question, answer.pause if isinstance(answer, Postponed) else blocked))
        return len(recorded), still_open

    async def _claim(self) -> list[_Question]:
        values = {
            "batch": _BATCH,
            # Longer than a question can take: nobody else asks meanwhile.
            "lease": self._settings.call_timeout + self._settings.call_margin,
            "settle_window": self._settings.settle_window,
        }
        async with transaction(self._engine, self._settings) as connection:
            rows = (await connection.execute(sql.CLAIM_QUESTIONS, values)).mappings().all()
        return [self._question(row) for row in rows]

    def _question(self, row: RowMapping) -> _Question:
        purchase = row["id"]
        return _Question(
            purchase=purchase,
            fence=row["fence"],
            attempt=row["attempt"],
            doubted=float(row["doubted"]),
            settles_in=float(row["settles_in"]),
            charged_in_vain=row["not_charged"],
            lock=Lock(keys.charge_lock(purchase), f"{self._worker}:ask:{secrets.token_hex(4)}"),
        )

    async def _take_locks(self, questions: Sequence[_Question]) -> list[_Question]:
        """The questions whose lock was obtained. The others are postponed for some seconds."""
        try:
            obtained = await self._locks.acquire([question.lock for question in questions])
        except RedisError as error:
            log.warning("locks_not_obtained", questions=len(questions), error=str(error))
            return []
        return [question for question, ours in zip(questions, obtained, strict=True) if ours]

    async def _ask(self, question: _Question) -> Answer:
        try:
            records: list[ChargeRecord] | None = await self._gateway.find(question.purchase)
        except GatewayUnavailable:
            records = None
        return judge(
            records,
            doubted=question.doubted,
            settles_in=question.settles_in,
            charged_in_vain=question.charged_in_vain,
            settings=self._settings,
        )

    async def _postpone(self, postponed: Sequence[tuple[_Question, float]]) -> None:
        if not postponed:
            return
        values = {
            "ids": [question.purchase for question, _ in postponed],
            "fences": [question.fence for question, _ in postponed],
            "pauses": [pause for _, pause in postponed],
        }
        try:
            async with transaction(self._engine, self._settings) as connection:
                await connection.execute(sql.POSTPONE, values)
        finally:
            await self._release([question.lock for question, _ in postponed])

    async def _release(self, locks: Sequence[Lock]) -> None:
        """Also of locks that were not obtained: the reply may have been lost, and nobody else's is touched."""
        try:
            await self._locks.release(locks)
        except RedisError as error:
            log.warning("locks_not_released", locks=len(locks), error=str(error))

    async def _recheck(self) -> Counter[str]:
        """Ask again about attempts that were never charged. A charge found now was made in spite of that: an alert."""
        counts: Counter[str] = Counter()
        async with transaction(self._engine, self._settings) as connection:
            rows = (await connection.execute(sql.CLAIM_RECHECKS, {"batch": _BATCH})).mappings().all()
        for row in rows:
            try:
                records = await self._gateway.find(row["purchase_id"].hex)
            except GatewayUnavailable:
                continue
            counts["rechecked"] += 1
            unexpected = [r.id for r in records if r.status == "succeeded" and r.id != row["charge_id"]]
            if unexpected:
                counts["found_late"] += len(unexpected)
                log.error("charge_found_late", purchase=row["purchase_id"].hex, charges=unexpected)
        return counts
