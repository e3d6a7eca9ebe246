"""Reconciliation: finding out what became of calls that nobody has an outcome of.

A purchase is in doubt when its call may or may not have been executed. It keeps its stock, and it is not charged again
while that is unknown. What the provider says settles it:

    asked ──┬─ one succeeded charge ───────────────────────▶ confirmed
            ├─ only declined ones ─────────────────────────▶ declined
            ├─ more than one succeeded ────────────────────▶ needs_review, and an alert
            ├─ none, asked before the settle window ended ─▶ asked again when it has ended
            ├─ none, asked after it ───────────────────────▶ never charged: one more attempt, then declined
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
from collections.abc import Sequence
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
from workers.record import NeedsReview, NotCharged, RecordedOutcome, Recorder, Result

log = structlog.get_logger()

#: Questions per round: a provider in trouble is not helped by thousands at once.
_BATCH = 50
#: A question that got no answer is repeated after this share of the time spent in doubt, within the bounds below: often
#: at first, once a minute at last.
_PATIENCE, _SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 1.0, 60.0


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
    pause = min(max(doubted * _PATIENCE, _SHORTEST_PAUSE), _LONGEST_PAUSE)
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
    return NotCharged(again=charged_in_vain == 0 and settings.not_charged == "retry")


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
        self._locks = NarrowLock(redis, settings.charge_lock_ttl)
        self._gateway = gateway
        self._recorder = recorder
        self._settings = settings
        self._worker = worker

    async def run_once(self) -> Reconciled:
        """One round: at most `_BATCH` questions, and as many later checks."""
        questions = await self._claim()
        crash_point("reconcile.after_claim")
        ours = await self._take_locks(questions)
        answers = await asyncio.gather(*(self._ask(question) for question in ours))
        crash_point("reconcile.after_answer")
        settled: list[Result] = []
        postponed: list[tuple[_Question, float]] = []
        for question, answer in zip(ours, answers, strict=True):
            if isinstance(answer, Postponed):
                postponed.append((question, answer.pause))
            else:
                if isinstance(answer, NeedsReview):
                    log.error("purchase_needs_review", purchase=question.purchase, reason=answer.reason)
                settled.append(Result(question.purchase, question.fence, question.attempt, question.lock, answer))
        if settled:
            await self._recorder.record(settled)
        await self._postpone(postponed)
        rechecked = await self._recheck()
        return Reconciled(len(ours), len(settled), len(postponed), **rechecked)

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
        purchase = row["id"].hex
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
        """The questions whose lock was obtained. The others come again when their lease is over."""
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
        async with transaction(self._engine, self._settings) as connection:
            await connection.execute(
                sql.POSTPONE,
                {
                    "ids": [question.purchase for question, _ in postponed],
                    "fences": [question.fence for question, _ in postponed],
                    "pauses": [pause for _, pause in postponed],
                },
            )
        try:
            await self._locks.release([question.lock for question, _ in postponed])
        except RedisError as error:
            log.warning("locks_not_released", locks=len(postponed), error=str(error))

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
