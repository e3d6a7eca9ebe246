"""Charging: the one effect that cannot be repeated, made at most once per purchase at any time.

A claim check says that purchases are due. Then, on one event loop per process:

    start_by = now + START_WITHIN ── claim, at most the free call slots: `charging`, a new fence  (committed: intent)
                                      │
                                      ▼
                      narrow locks, one round trip for the whole claim ── not obtained, Redis away ──▶ not sent
                                      │
                                      ▼
                      payment call ── at the moment of writing: past start_by ──▶ not sent
                                      │
                                      ▼
                      outcome ── grouped with others, one commit, counted under its fence ──▶ lock released
                                 └─ somebody keeps the purchase locked ──▶ brought again, by this call alone

What each part is for. The intent, committed before a byte is sent, tells everybody else that a call may be under way,
and until when: `call_deadline`. The fence tells whose outcome counts. `start_by` keeps a process that was frozen after
its claim from calling when the others believe that it will not any more; it is counted from before the claim. The
narrow lock keeps two calls for one purchase apart even if Postgres came back without the last intent. The slots keep
claims from waiting: what is claimed is called at once.

Who looks again. A drain goes on while something is due. In its first second it also stays when it had all that was due,
until it looks and finds nothing, and sets the mark `called:charges` itself: it is as if it had been called. It deletes
the mark before its next claim, as anybody who was called does. If it ends without another look, as it was told to stop
for one, it takes the mark back; should it die in between, the mark expires as that of a lost message does. The sweep
calls.

A gateway whose calls have no short deadline (`Capabilities.long_calls`) has its locks renewed until the outcome is
recorded. Such a purchase becomes in doubt at its deadline like any other, since that is judged by Postgres alone; but
nobody asks the provider about it while the lock is held, so it is not taken for "never charged" either.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, assert_never

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine

from shared import keys, statuses
from shared.calling import CHARGES_CALL, Caller
from shared.crash_points import crash_point
from shared.database import transaction
from shared.groups import Group
from shared.narrow_lock import Lock, NarrowLock
from shared.purchases import PurchaseRecord
from shared.rhythm import Rhythm
from shared.routing import CHARGES_QUEUE
from shared.settings import Settings
from shared.statements import charge as sql
from workers.breaker import Breaker
from workers.gateways import ChargeOutcome, Confirmed, Declined, Gateway, InDoubt, NotSent
from workers.record import Claim, Recorded, Recorder, Result

log = structlog.get_logger()

#: Seconds until an outcome whose purchase somebody has locked is brought again, doubled up to the longest. Most such
#: locks are a transaction of ours that takes milliseconds; a forgotten session is not asked for more often than this.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


#: The slots are claimed in parts: with all of them in one claim, all would be claimed, called and recorded at the same
#: times, and nobody would be called while others are recorded. Parts smaller than the smallest save nothing.
_PARTS, _SMALLEST_PART = 4, 16

#: Seconds between two claims, unless the last one used all its slots, and between two commits of outcomes: not much
#: beside a payment, and enough for some to come together. Who comes alone waits for neither.
_CLAIMS_EVERY, _OUTCOMES_EVERY = 0.1, 0.1

#: Seconds from its beginning for which a drain looks again after it had all that was due. In a sale something is due
#: all the time, and a message for each time would cost more than the claim it leads to.
_STAY = 1.0


@dataclass(frozen=True, slots=True)
class Charged:
    """What one claim check led to: the result of the task `purchases.charge`."""

    claimed: int = 0
    confirmed: int = 0
    declined: int = 0
    not_sent: int = 0
    in_doubt: int = 0
    seconds: float = 0.0

    def as_result(self) -> dict[str, Any]:
        """As Celery shows it."""
        return asdict(self) | {"seconds": round(self.seconds, 6)}


class Charger:
    """Claims and charges on one event loop. Several drains may run at once; they share the slots."""

    def __init__(
        self,
        engine: AsyncEngine,
        redis: Redis,
        gateway: Gateway,
        caller: Caller,
        settings: Settings,
        worker: str,
    ) -> None:
        self._engine = engine
        self._redis = redis
        self._gateway = gateway
        self._settings = settings
        self._worker = worker
        self._caller = caller
        self._recorder = Recorder(engine, redis, caller, settings)
        self._locks = NarrowLock(redis, settings.charge_lock_ttl, self._recorder.lock_metrics)
        self._outcomes: Group[Result, tuple[Recorded, asyncio.Event]] = Group(
            self._commit, batch=settings.charge_slots, every=_OUTCOMES_EVERY
        )
        self._free = settings.charge_slots
        self._most_at_once = max(_SMALLEST_PART, settings.charge_slots // _PARTS)
        self._slot_freed = asyncio.Event()
        self._rhythm = Rhythm(_CLAIMS_EVERY)
        self._all_used = False
        #: Whether the mark of the charges says that we look again.
        self._marked = False
        self._breaker = Breaker()

    async def drain(self, stopping: Callable[[], bool] = lambda: False) -> Charged:
        """Claim and charge until nothing is due or somebody wants to stop; returns when its own calls are recorded.

        Raises sqlalchemy.exc.DBAPIError when Postgres fails at a claim; calls under way are recorded all the same.
        """
        began = time.monotonic()
        counts: Counter[str] = Counter()
        calls: set[asyncio.Task[None]] = set()
        try:
            while not stopping() and await self._claim_and_call(counts, calls, stopping, began + _STAY):
                pass
        finally:
            try:
                if self._marked:
                    await self._take_mark_back(call=stopping())
            finally:
                # Also when a claim failed: a call under way is never cancelled, its outcome is wanted.
                if calls:
                    await asyncio.wait(calls)
        await self._locks.tell()
        return Charged(**counts, seconds=time.monotonic() - began)

    async def _claim_and_call(
        self, counts: Counter[str], calls: set[asyncio.Task[None]], stopping: Callable[[], bool], stay_until: float
    ) -> bool:
        """One claim and the start of its calls. Whether to go on: something was due, and locks were to be had."""
        if not self._all_used:
            await self._rhythm.beat()
        free = await self._take_free_slots()
        slots = self._breaker.allows(free, time.monotonic())
        self._give_back(free - slots)
        if slots == 0:
            # The provider is in trouble. The sweep calls again, and then one call finds out whether it still is.
            return False
        if stopping():
            # Asked to while it waited for a slot: another call would hold the shutdown up for as long again.
            self._give_back(slots)
            return False
        start_by = time.monotonic() + self._settings.start_within
        claims: list[Claim] = []
        try:
            await self._forget_call()
            claims = await self._claim(slots)
        finally:
            self._give_back(slots - len(claims))
        if not claims:
            self._all_used = False
            return False
        self._breaker.claimed()
        crash_point("charge.after_claim")
        counts["claimed"] += len(claims)
        # All slots used: more may be due, also for others, who are to be called.
        self._all_used = all_used = len(claims) == slots
        stay = not all_used and time.monotonic() < stay_until
        obtained = await self._take_locks(claims, stay=stay)
        crash_point("charge.after_lock")
        for claim, ours in zip(claims, obtained, strict=True):
            call = asyncio.create_task(self._charge(claim, start_by, counts, lock_obtained=ours))
            calls.add(call)
            call.add_done_callback(calls.discard)
        # Without Redis, claiming on would only move rows back and forth; the sweep calls again.
        return any(obtained) and (all_used or stay)

    def _tell_breaker(self, outcome: ChargeOutcome) -> None:
        match outcome:
            case Confirmed() | Declined():
                self._breaker.succeeded()
            case NotSent(reason="too_late"):
                pass  # our own delay says nothing about the provider
            case NotSent(reason, alert):
                if self._breaker.failed(time.monotonic(), alert=alert):
                    log.error("claims_paused", reason=reason, alert=alert)
            case InDoubt(reason):
                if self._breaker.failed(time.monotonic()):
                    log.error("claims_paused", reason=reason, alert=False)
            case _:
                assert_never(outcome)

    async def _take_free_slots(self) -> int:
        """Slots that are free, one or more, and at most a share of all: what is claimed never waits for a slot."""
        if self._free == 0 and self._marked:
            await self._forget_call()  # That may take a while; somebody else may have slots.
        while self._free == 0:
            self._slot_freed.clear()
            await self._slot_freed.wait()
        slots = min(self._free, self._most_at_once)
        self._free -= slots
        return slots

    def _give_back(self, slots: int) -> None:
        self._free += slots
        if self._free:
            self._slot_freed.set()

    async def _forget_call(self) -> None:
        # Before the claim reads, as with a lane: work committed after that read is called for again.
        self._marked = False
        try:
            await self._redis.delete(keys.called(CHARGES_QUEUE))
        except RedisError as error:
            log.warning("call_not_forgotten", queue=CHARGES_QUEUE, error=str(error))

    async def _take_mark_back(self, *, call: bool) -> None:
        """We said that we would look again, and do not. With `call` somebody else is called in our place: what became
        due meanwhile called nobody. Otherwise that is for the sweep, as the provider or Redis is in trouble.
        """
        await self._forget_call()
        if call:
            await asyncio.to_thread(self._caller.call, [CHARGES_CALL])

    async def _claim(self, slots: int) -> list[Claim]:
        """Up to `slots` due purchases, their intent committed."""
        async with transaction(self._engine, self._settings) as connection:
            values = {"slots": slots, "worker": self._worker, "overdue_after": self._settings.overdue_after}
            rows = (await connection.execute(sql.CLAIM, values)).mappings().all()
        return [
            Claim(
                record=PurchaseRecord.from_row(row),
                attempt=row["attempt"],
                fence=row["fence"],
                call_deadline=row["call_deadline"],
                worker=self._worker,
                payment_token=row["payment_token"],
            )
            for row in rows
        ]

    async def _take_locks(self, claims: Sequence[Claim], *, stay: bool) -> list[bool]:
        """Per claim, whether its narrow lock was obtained. The statuses of the claims are written on the way, and the
        mark of the charges if we stay.
        """
        try:
            obtained, _ = await asyncio.gather(
                self._locks.acquire([claim.lock for claim in claims]), self._tell_of(claims, stay=stay)
            )
            return obtained
        except RedisError as error:
            log.warning("locks_not_obtained", claims=len(claims), error=str(error))
        except Exception as error:
            # Whatever it was, the claims and their slots must be given back.
            log.error("locks_not_obtained", claims=len(claims), exc_info=error)
        return [False] * len(claims)

    async def _tell_of(self, claims: Sequence[Claim], *, stay: bool) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            if stay:
                # We look again in a moment, and nobody need be called until then.
                self._caller.queue_marks(pipe, [CHARGES_CALL])
                self._marked = True
            statuses.queue_write(pipe, [claim.record for claim in claims], self._settings)
            await pipe.execute()

    async def _charge(self, claim: Claim, start_by: float, counts: Counter[str], *, lock_obtained: bool) -> None:
        """One call and its outcome; the slot is free again when the outcome is committed."""
        try:
            if lock_obtained:
                async with self._kept(claim):
                    outcome = await self._gateway.charge(claim.request, start_by=start_by)
                    self._tell_breaker(outcome)
                    crash_point("charge.after_call")
                    await self._record(claim, outcome)
            else:
                outcome = NotSent("lock_not_obtained")
                await self._record(claim, outcome)
            match outcome:
                case Confirmed():
                    counts["confirmed"] += 1
                case Declined():
                    counts["declined"] += 1
                case NotSent():
                    counts["not_sent"] += 1
                case InDoubt():
                    counts["in_doubt"] += 1
                case _:
                    assert_never(outcome)
        except Exception as error:
            log.error("charge_failed", purchase=claim.record.id, exc_info=error)
        finally:
            self._locks.abandon([claim.lock])
            self._breaker.ended()
            self._give_back(1)

    def _kept(self, claim: Claim) -> AbstractAsyncContextManager[None]:
        """Around a call and its record: the lock is renewed if the call may outlast it."""
        if not self._gateway.capabilities.long_calls:
            return nullcontext()

        def lost(lock: Lock) -> None:
            # The call cannot be taken back. Whether its outcome counts is decided by its fence.
            log.error("lock_lost_during_call", purchase=claim.record.id, fence=claim.fence, owner=lock.owner)

        return self._locks.renewing(claim.lock, lost)

    async def _record(self, claim: Claim, outcome: ChargeOutcome) -> None:
        """Bring an outcome until it is recorded: it is known, and not given up."""
        pause = _FIRST_PAUSE
        while await self._became(Result.of(claim, outcome)) is Recorded.LATER:
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _became(self, result: Result) -> Recorded:
        recorded, told = await self._outcomes.bring(result)
        await told.wait()
        return recorded

    async def _commit(self, results: Sequence[Result]) -> list[tuple[Recorded, asyncio.Event]]:
        """One group of outcomes. The next is committed while Redis is told of this one."""
        recorded, told = await self._recorder.commit(results)
        return [(became, told) for became in recorded]
