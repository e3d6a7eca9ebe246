"""Recording what came of payment calls: outcomes by the group, one transaction each, counted only under their fence.

A purchase that somebody keeps locked is passed over, so that it delays no other: its outcome is answered "later", and
whoever brought it brings it again. After the commit Redis is told, and the narrow locks are let go of.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from typing import Any, assert_never

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import RowMapping, TextClause
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shared import doors, keys, statuses
from shared.calling import Call, Caller, lane_call
from shared.crash_points import crash_point
from shared.database import cause, is_passing, transaction
from shared.doors import Door
from shared.lock_metrics import LockMetrics
from shared.narrow_lock import Lock, NarrowLock
from shared.purchases import PurchaseRecord
from shared.settings import Settings
from shared.statements import charge as sql
from shared.states import Status
from workers.gateways import ChargeOutcome, ChargeRequest, Confirmed, Declined, InDoubt, NotSent

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode

#: Attempts after which the pause between tries no longer doubles: 0.5 s then has become half a minute.
_LONGEST_PAUSE = 6


@dataclass(frozen=True, slots=True)
class Claim:
    """One purchase that this worker may charge now: its intent is committed under `fence`."""

    record: PurchaseRecord
    attempt: int
    fence: int
    call_deadline: datetime
    worker: str
    payment_token: str = field(repr=False)
    #: Unlike any other claim's, even if Postgres came back without this one and gives its fence out again. Nobody gains
    #: by guessing it, so the ordinary generator will do.
    nonce: str = field(default_factory=lambda: f"{random.getrandbits(64):016x}")

    @property
    def lock(self) -> Lock:
        """The narrow lock around its call. Its value shows an operator who is in, and under which fence."""
        return Lock(keys.charge_lock(self.record.id), f"{self.worker}:{self.fence}:{self.nonce}")

    @property
    def request(self) -> ChargeRequest:
        """What the gateway is asked to charge."""
        record = self.record
        return ChargeRequest(record.id, record.amount, record.currency, record.customer, self.payment_token)


@dataclass(frozen=True, slots=True)
class NotCharged:
    """The provider knows of no charge, asked late enough to mean it. `again`: worth one more attempt."""

    again: bool


@dataclass(frozen=True, slots=True)
class NeedsReview:
    """Only an operator can tell."""

    reason: str


RecordedOutcome = ChargeOutcome | NotCharged | NeedsReview


class Result(msgspec.Struct, frozen=True):
    """What came of one attempt to charge one purchase. `lock` is let go of once it is recorded."""

    purchase: str
    fence: int
    attempt: int
    lock: Lock
    outcome: RecordedOutcome

    @classmethod
    def of(cls, claim: Claim, outcome: ChargeOutcome) -> Result:
        """The result of a claim's call."""
        return cls(claim.record.id, claim.fence, claim.attempt, claim.lock, outcome)


class Recorded(Enum):
    """What became of a result that was brought to be recorded."""

    COUNTED = auto()  #: committed, now or before
    DID_NOT_COUNT = auto()  #: the purchase had moved on; what is known stands on the attempt
    LATER = auto()  #: somebody has the purchase locked: nothing was written, bring it again


#: A purchase under one fence: what an outcome belongs to.
_Attempt = tuple[str, int]


class _Row(msgspec.Struct, frozen=True):
    """A result as the statements take it: `status` is for the purchase, `outcome` for the attempt."""

    id: str
    fence: int
    status: Status
    outcome: str
    reason: str | None = None
    charge_id: str | None = None
    retry_after: float = 0.0


@dataclass(frozen=True, slots=True)
class Written:
    """What one transaction changed: purchases and door records at their new revision, lanes whose waitlist may move.

    `records` are by the attempt whose outcome they show, also one that was recorded before.
    """

    records: Mapping[_Attempt, PurchaseRecord] = field(default_factory=dict)
    doors: Sequence[Door] = ()
    lanes: Sequence[int] = ()
    passed_over: frozenset[str] = frozenset()  #: Purchases that somebody has locked.

    def __add__(self, other: Written) -> Written:
        return Written(
            {**self.records, **other.records},
            [*self.doors, *other.doors],
            [*self.lanes, *other.lanes],
            self.passed_over | other.passed_over,
        )


class Recorder:
    """Writes results to Postgres and, after the commit, tells Redis and lets go of the locks."""

    def __init__(self, engine: AsyncEngine, redis: Redis, caller: Caller, settings: Settings) -> None:
        self._engine = engine
        self._redis = redis
        self._caller = caller
        self._settings = settings
        #: Shared with those who take the locks that are let go of here, so that holds are measured from end to end.
        self.lock_metrics = LockMetrics(settings.charge_lock_ttl)
        self._locks = NarrowLock(redis, settings.charge_lock_ttl, self.lock_metrics)
        #: Kept, as the loop itself would let them be collected.
        self._telling: set[asyncio.Task[None]] = set()

    async def record(self, results: Sequence[Result]) -> list[Recorded]:
        """Per result, what became of it. The locks of all but those for later are let go of."""
        recorded, told = await self.commit(results)
        await told.wait()
        return recorded

    async def commit(self, results: Sequence[Result]) -> tuple[list[Recorded], asyncio.Event]:
        """As `record`, but Redis is told while others may be committed already: the event is set when it has been."""
        written = await self._written(results)
        told = asyncio.Event()
        telling = asyncio.create_task(self._tell(results, written, told))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)
        return [self._answer(result, written) for result in results], told

    async def _tell(self, results: Sequence[Result], written: Written, told: asyncio.Event) -> None:
        try:
            await self._publish([result for result in results if result.purchase not in written.passed_over], written)
            crash_point("record.after_publish")
        except Exception as error:
            # It is committed, whatever this was; the locks run out and readers ask Postgres.
            log.error("outcomes_not_published", outcomes=len(results), exc_info=error)
        finally:
            told.set()

    def _answer(self, result: Result, written: Written) -> Recorded:
        if result.purchase in written.passed_over:
            log.warning("purchase_is_locked", purchase=result.purchase)
            return Recorded.LATER
        if (result.purchase, result.fence) in written.records:
            return Recorded.COUNTED
        # Nothing happened that somebody must look at if it was not even sent: a frozen worker woke up.
        tell = log.warning if isinstance(result.outcome, NotSent) else log.error
        tell("outcome_did_not_count", purchase=result.purchase, outcome=result.outcome)
        return Recorded.DID_NOT_COUNT

    async def _written(self, results: Sequence[Result]) -> Written:
        """Write, again and again while Postgres is away: a known outcome is not given up.

        One that Postgres refuses does not take its neighbours with it: the group is halved until it stands alone. It
        then stays `charging` and is found by its deadline.
        """
        pause = 0.1
        while True:
            try:
                return await self._write(results)
            except (SQLAlchemyError, OSError) as error:
                if is_passing(error):
                    log.warning("outcomes_not_recorded", outcomes=len(results), error=cause(error), again_in=pause)
                    await asyncio.sleep(pause)
                    # Two seconds at most: soon enough after Postgres came back, and no load while it comes.
                    pause = min(pause * 2, 2.0)
                    continue
                if len(results) == 1:
                    log.error("outcome_refused", purchase=results[0].purchase, error=cause(error))
                    return Written()
                half = len(results) // 2
                first, second = await self._written(results[:half]), await self._written(results[half:])
                return first + second

    async def _write(self, results: Sequence[Result]) -> Written:
        async with transaction(self._engine, self._settings) as connection:
            passed_over, unpaid = await self._lock(connection, results)
            brought = [result for result in results if result.purchase not in passed_over]
            if not brought:
                return Written(passed_over=passed_over)
            results = await self._claim_again(connection, brought, unpaid)
            rows = [_row(result, self._settings.charge_retry) for result in results]
            told = _encode(rows).decode()
            ids = [row.id for row in rows]
            written = await _fetch(connection, sql.RECORD, results=told, ids=ids)
            moved = {(row["id"], row["fence"]): PurchaseRecord.from_row(row) for row in written}
            moved_doors = await self._settle_stock(connection, list(moved.values()))
            records = moved | await self._recorded_before(connection, results, rows, moved)
            for told_as, result in zip(brought, results, strict=True):
                if (record := records.get((result.purchase, result.fence))) is not None:
                    records[told_as.purchase, told_as.fence] = record
            skus = sorted({record.item for record in records.values() if record.final})
            lanes = await _fetch(connection, sql.RECORD_ATTEMPTS, results=told, ids=ids, skus=skus)
            crash_point("record.before_commit")
        crash_point("record.after_commit")
        return Written(records, moved_doors, [row["lane"] for row in lanes], passed_over)

    async def _lock(
        self, connection: AsyncConnection, results: Sequence[Result]
    ) -> tuple[frozenset[str], frozenset[str]]:
        """Lock the purchases of these results. Returns those that somebody else has locked, and those of ours that are
        `reserved`: nobody seems to be charging them.
        """
        ids = {result.purchase for result in results}
        locked = {row["id"]: row["status"] for row in await _fetch(connection, sql.LOCK_PURCHASES, ids=sorted(ids))}
        unpaid = frozenset(purchase for purchase, status in locked.items() if status == Status.RESERVED)
        ids -= locked.keys()
        if not ids:
            return frozenset(), unpaid
        return frozenset(row["id"].hex for row in await _fetch(connection, sql.EXISTING, ids=sorted(ids))), unpaid

    async def _claim_again(
        self, connection: AsyncConnection, results: Sequence[Result], unpaid: frozenset[str]
    ) -> Sequence[Result]:
        """The results; of charges whose purchases look unpaid, under a new fence."""
        forgotten = [each for each in results if each.purchase in unpaid and isinstance(each.outcome, Confirmed)]
        if not forgotten:
            return results
        values = {
            "ids": [each.purchase for each in forgotten],
            "workers": [each.lock.owner for each in forgotten],
        }
        fences = {row["id"].hex: row["fence"] for row in await _fetch(connection, sql.CLAIM_AGAIN, **values)}
        for purchase in fences:
            log.error("charge_of_forgotten_intent", purchase=purchase)
        return [
            msgspec.structs.replace(each, fence=fences[each.purchase]) if each in forgotten else each
            for each in results
        ]

    async def _recorded_before(
        self,
        connection: AsyncConnection,
        results: Sequence[Result],
        rows: Sequence[_Row],
        moved: Mapping[_Attempt, PurchaseRecord],
    ) -> dict[_Attempt, PurchaseRecord]:
        """The purchases of those results that an earlier commit recorded, as they stand now.

        The reply to that commit was lost: it is success, and what follows a commit is still to be done. A purchase that
        went back to `reserved` may have been claimed again meanwhile, under another fence; then its attempt tells.
        """
        wanted = {
            (result.purchase, result.fence): row
            for result, row in zip(results, rows, strict=True)
            if (result.purchase, result.fence) not in moved
        }
        if not wanted:
            return {}
        ids, fences = zip(*wanted, strict=True)
        standing = await _fetch(connection, sql.STANDING, ids=list(ids), fences=list(fences))
        found = {}
        for stands in standing:
            attempt = stands["id"], stands["told_fence"]
            if _stands_already(wanted[attempt], stands, same_fence=stands["fence"] == attempt[1]):
                found[attempt] = PurchaseRecord.from_row(stands)
        return found

    async def _settle_stock(self, connection: AsyncConnection, records: Sequence[PurchaseRecord]) -> list[Door]:
        """End the holds of what was paid or declined."""
        returned: defaultdict[str, int] = defaultdict(int)
        sold: defaultdict[str, int] = defaultdict(int)
        for record in records:
            if record.status is Status.CONFIRMED:
                sold[record.item] += record.quantity
            elif record.status is Status.DECLINED:
                returned[record.item] += record.quantity
        skus = sorted(returned.keys() | sold.keys())
        if not skus:
            return []
        if len(skus) > 1:  # a single one is locked by its change
            await connection.execute(sql.LOCK_ITEMS, {"skus": skus})
        rows = await _fetch(
            connection,
            sql.SETTLE_STOCK,
            skus=skus,
            returned=[returned[sku] for sku in skus],
            sold=[sold[sku] for sku in skus],
        )
        return [Door.from_row(row) for row in rows]

    async def _publish(self, results: Sequence[Result], written: Written) -> None:
        """After the commit: statuses, door records, locks, calls, in one pipeline. Only logged if it fails."""
        calls: list[Call] = [lane_call(lane) for lane in sorted(set(written.lanes))]
        if not results:
            return
        async with self._redis.pipeline(transaction=False) as pipe:
            self._caller.queue_marks(pipe, calls)
            statuses.queue_write(pipe, list(written.records.values()), self._settings)
            doors.queue_write(pipe, written.doors, self._settings)
            release = self._locks.queue_release(pipe, [result.lock for result in results])
            try:
                replies: list[Any] = await pipe.execute()
            except RedisError as error:
                release.failed()
                log.warning("outcomes_not_published", outcomes=len(results), error=str(error))
                return
        release.read(replies)
        to_publish = self._caller.to_publish(calls, replies)
        if to_publish:
            await asyncio.to_thread(self._caller.publish, to_publish)


def _row(result: Result, retry: float) -> _Row:
    attempt = result.purchase, result.fence
    match result.outcome:
        case Confirmed(charge_id):
            return _Row(*attempt, Status.CONFIRMED, "confirmed", charge_id=charge_id)
        case Declined(reason, charge_id):
            return _Row(*attempt, Status.DECLINED, "declined", reason, charge_id)
        case NotSent(reason, _, retry_after):
            pause = retry * 2 ** min(result.attempt - 1, _LONGEST_PAUSE) * random.uniform(0.5, 1.5)
            return _Row(*attempt, Status.RESERVED, "not_sent", reason, retry_after=max(pause, retry_after or 0.0))
        case InDoubt(reason):
            return _Row(*attempt, Status.IN_DOUBT, "in_doubt", reason)
        case NotCharged(again=True):
            return _Row(*attempt, Status.RESERVED, "not_charged", "not_charged")
        case NotCharged():
            return _Row(*attempt, Status.DECLINED, "not_charged", "not_charged")
        case NeedsReview(reason):
            return _Row(*attempt, Status.NEEDS_REVIEW, "needs_review", reason)
        case _:
            assert_never(result.outcome)


def _stands_already(row: _Row, stands: RowMapping, *, same_fence: bool) -> bool:
    """Whether an earlier commit of this outcome is why RECORD did not take it."""
    if same_fence or row.charge_id is not None:  # one charge has one id, whatever fence it was recorded under
        return (row.status, row.charge_id) == (stands["status"], stands["charge_id"])
    # Only of outcomes that moved nothing: that a charge was made and did not count is an alert every time.
    return row.status is Status.RESERVED and row.outcome == stands["attempt_outcome"]


async def _fetch(connection: AsyncConnection, statement: TextClause, **values: Any) -> Sequence[RowMapping]:
    return (await connection.execute(statement, values)).mappings().all()
