"""Draining a lane: the loop that turns a line of purchases into verdicts.

Who comes. A claim check says that a lane has work. Several may come at once; the lane's row lock lets one at a time
decide. The first batch waits for the lock (a bounded time), because whoever holds it may have read the line before the
work we were called for was committed. Later batches do not wait: whoever has the lock by then carries on.

Why no work is left behind. The mark `called:<queue>` is deleted after the lock is granted and before the line is read:

    lock the lane ── DEL called ── read the line ── decide, write ── commit (lock released)
                          │              └ sees everything committed before it
                          └ whoever commits after this read finds the mark free, and calls again

Deleting after the read, or not waiting the first time, would each leave a row that nobody comes for. Once is enough: a
mark that is there in a later batch was set since, and whoever set it has called.

Which is why a visit ends with the first batch that read all there was to decide. Whatever makes a row one that can be
decided after that read (a purchase, stock that returns, an item that was changed) calls the lane after its commit.

What a failure costs. A process that dies or stalls in the middle loses its transaction and with it the lock, within
`IDLE_IN_TRANSACTION_TIMEOUT`; nothing was written. The claim check is gone; the sweep calls the lane again. Everything
in Redis (statuses, door records, the watermark, the call to the charges) is written after the commit and may fail:
readers fall back on Postgres, and the sweep repeats the call.

Where more is waiting, a thread tells Redis of a batch while the next one is decided: a third of a batch's time. It is
never more than one behind, and tells them in their order. Dying there costs what dying after the commit costs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass
from typing import Any

import structlog
from psycopg import errors as postgres
from redis import Redis, RedisError
from sqlalchemy import Connection, Engine, Row, RowMapping, TextClause
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from shared import doors, keys, statuses
from shared.calling import CHARGES_CALL, Caller, lane_call
from shared.crash_points import crash_point
from shared.database import LIMITS, cause, limits, literal
from shared.doors import Door
from shared.purchases import STATUSES, PurchaseRecord, rfc3339
from shared.routing import queue_of
from shared.settings import Settings
from shared.statements import decide as sql
from shared.states import FINAL, Reason, Status
from workers.verdicts import Stock, Verdict, Waiting, decide

log = structlog.get_logger()

#: A batch that was refused is tried again at this fraction of its size: three tries single one of 1,000 out.
_SMALLER = 23


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction settled, as it stands in Postgres after its commit.

    `whole` says that it read all there was to decide, and not only as many as fit.
    """

    records: Sequence[PurchaseRecord] = ()
    doors: Sequence[Door] = ()
    decided_through: int | None = None
    whole: bool = True

    @property
    def reserved(self) -> int:
        """How many purchases got stock."""
        return sum(record.status is Status.RESERVED for record in self.records)


@dataclass(frozen=True, slots=True)
class Line:
    """The head of a lane's line: the rows to decide, the items that have a waitlist, and whether these rows are the
    `whole` of what there is to decide.
    """

    rows: Sequence[Row[Any]]
    waited_for: frozenset[str]
    whole: bool


@dataclass(frozen=True, slots=True)
class Drained:
    """What one claim check led to: the result of the task `purchases.decide`.

    `left` says that the lane was given up with work in it, and called again.
    """

    decided: int = 0
    reserved: int = 0
    left: bool = False
    seconds: float = 0.0

    def as_result(self) -> dict[str, Any]:
        """As Celery shows it."""
        return asdict(self) | {"seconds": round(self.seconds, 6)}


class LaneTakenError(Exception):
    """Somebody else has the lane's lock, and decides it; or, with `ours`, keeps a row that the lane's turn needs."""

    def __init__(self, *, ours: bool) -> None:
        super().__init__()
        self.ours = ours


class Decider:
    """Decides lanes on one database connection. One per process; not for several threads at once."""

    def __init__(
        self, engine: Engine, redis: Redis, caller: Caller, settings: Settings, teller: Executor | None = None
    ) -> None:
        """`teller` is what runs beside the decisions, one call at a time: a thread, unless a test takes its place."""
        self._engine = engine
        self._redis = redis
        self._caller = caller
        self._settings = settings
        self._teller = teller or ThreadPoolExecutor(1, thread_name_prefix="telling")
        self._telling: Future[None] | None = None
        #: The first message of a batch, by lane and whether to wait for its lock.
        self._locks = _locks(settings)

    def drain(self, lane: int, stopping: Callable[[], bool] = lambda: False) -> Drained:
        """Decide what waits in the lane, batch by batch, until one read all there was or the slice of time is over.

        Raises sqlalchemy.exc.DBAPIError when Postgres fails; then nothing of the batch under way was written.
        """
        began = time.monotonic()
        decided = reserved = 0
        left = False
        first = True
        try:
            while True:
                try:
                    batch = self._settle(lane, wait=first)
                except LaneTakenError as taken:
                    left = first or taken.ours
                    if left:
                        # Whoever has it may have read before the work we came for, or decides nothing: somebody must
                        # come again.
                        self._forget_call(lane)
                    break
                if not batch.records:
                    break
                first = False
                decided += len(batch.records)
                reserved += batch.reserved
                self._tell(lane, batch)
                if batch.whole:
                    # Whoever was committed since it was read found no mark, or that of somebody who has called since.
                    break
                left = stopping() or time.monotonic() - began >= self._settings.decide_slice
                if left:
                    break
        finally:
            self._wait_until_told()
        if left:
            self._caller.call([lane_call(lane)])
        return Drained(decided, reserved, left=left, seconds=time.monotonic() - began)

    def _settle(self, lane: int, *, wait: bool) -> Batch:
        """One batch; when Postgres refuses it, ever smaller ones, until the purchase at fault stands alone and is set
        aside. Its neighbours keep their turn.
        """
        size, alone = self._settings.decide_batch, False
        while True:
            try:
                return self.run_batch(lane, wait=wait, size=size, set_aside=alone)
            except (IntegrityError, DataError) as error:
                log.error("batch_refused", lane=lane, purchases=size, error=cause(error))
                if alone:
                    raise
                alone = size == 1
                size = max(1, size // _SMALLER)

    def run_batch(self, lane: int, *, wait: bool, size: int | None = None, set_aside: bool = False) -> Batch:
        """One batch: lock, read, decide, write, commit. An empty batch means that nothing could be settled.

        `size` is how many purchases to decide (`DECIDE_BATCH`). With `set_aside` none of them is decided: they go to
        `needs_review`, holding nothing. Raises LaneTakenError when the lane's lock was not to be had, or that of a row
        of its purchases and items.
        """
        ours = False
        try:
            with self._engine.begin() as connection:
                through = self._lock_lane(connection, lane, wait=wait)
                ours = True
                crash_point("decide.after_lock")
                if wait:
                    self._forget_call(lane)
                    crash_point("decide.after_forget")
                batch = self._decide_batch(connection, lane, through, size or self._settings.decide_batch, set_aside)
                crash_point("decide.before_commit")
            crash_point("decide.after_commit")
            return batch
        except DBAPIError as error:
            if isinstance(error.orig, postgres.LockNotAvailable) or (
                not ours and isinstance(error.orig, postgres.QueryCanceled)
            ):
                raise LaneTakenError(ours=ours) from error
            raise

    def _lock_lane(self, connection: Connection, lane: int, *, wait: bool) -> int:
        """Lock the lane within the limits of a transaction; returns how far it was decided.

        Two statements in one message: of what a purchase waits that comes alone, on a machine that is busy, most is the
        way to Postgres and back, and a processor at either end.
        """
        with connection.exec_driver_sql(self._locks[lane, wait]) as result:
            cursor: Any = result.cursor
            cursor.nextset()
            through: int = cursor.fetchone()[0]
        return through

    def _decide_batch(self, connection: Connection, lane: int, through: int, size: int, set_aside: bool) -> Batch:
        line = self._read_line(connection, lane, size)
        if not line.rows:
            return Batch()
        purchases = [_waiting(row) for row in line.rows]
        skus = sorted({purchase.item for purchase in purchases})
        item_rows = _fetch(connection, sql.LOCK_ITEMS, skus=skus)
        # Only this lane's turn adds to a waitlist.
        waited_for = [sku for sku in skus if sku in line.waited_for]
        last = _fetch(connection, sql.LAST_WAITLISTED, lane=lane, skus=waited_for) if waited_for else []
        ends = {row["sku"]: row["seq"] for row in last}
        stocks = {row["sku"]: _stock(row, ends.get(row["sku"])) for row in item_rows}
        if set_aside:
            verdicts = [Verdict(purchase, Status.NEEDS_REVIEW, Reason.UNDECIDABLE) for purchase in purchases]
        else:
            verdicts = decide(purchases, stocks, self._holdings(connection, purchases, stocks))
        for verdict in verdicts:
            if verdict.error is not None:
                log.error("purchase_set_aside", purchase=verdict.purchase.id, lane=lane, exc_info=verdict.error)

        through = max(through, *(purchase.seq for purchase in purchases))
        now = rfc3339(item_rows[0]["now"])
        read = {row.id: row for row in line.rows}
        settled = {v.purchase.id: _settled(read[v.purchase.id], v, now) for v in verdicts}
        values = {
            "ids": _array(settled),
            "were": _array(v.purchase.status for v in verdicts),
            "statuses": _array(v.status for v in verdicts),
            "reasons": _array(v.reason for v in verdicts),
            "holds": _array(v.hold_seconds for v in verdicts),
            "decided": _array(record.decided_at for record in settled.values()),
            "finished": _array(record.finished_at for record in settled.values()),
            "lane": lane,
            "decided_through": through,
        }
        records = [settled[purchase] for purchase in connection.execute(sql.WRITE_VERDICTS, values).scalars().all()]
        return Batch(records, self._take_stock(connection, verdicts), through, line.whole)

    def _read_line(self, connection: Connection, lane: int, batch: int) -> Line:
        """The rows to decide: waitlists that can move now, then the queue; each in order, locked."""
        queued = _read(connection, sql.READ_QUEUED, lane=lane, batch=batch)
        # An empty queue tells nothing of the waitlists.
        may_wait = not queued or queued[0].anybody_waitlisted
        waitlists = _fetch(connection, sql.WAITLISTS, lane=lane) if may_wait else []
        waited_for = frozenset(row["item"] for row in waitlists)
        moving = [row["item"] for row in waitlists if row["moves"]]
        waitlisted = _read(connection, sql.READ_WAITLISTED, lane=lane, items=moving, batch=batch) if moving else []
        if batch == 1 and waitlisted:
            # One means one: whatever is wrong is wrong with it.
            return Line(waitlisted, waited_for, whole=False)
        return Line([*waitlisted, *queued], waited_for, whole=max(len(waitlisted), len(queued)) < batch)

    def _holdings(
        self, connection: Connection, purchases: Sequence[Waiting], stocks: dict[str, Stock]
    ) -> dict[tuple[str, str, str], int]:
        limited = {
            purchase.holder
            for purchase in purchases
            if purchase.item in stocks and stocks[purchase.item].per_customer is not None
        }
        if not limited:
            return {}
        items, clients, customers = zip(*sorted(limited), strict=True)
        rows = _fetch(connection, sql.HOLDINGS, items=list(items), clients=list(clients), customers=list(customers))
        return {(row["item"], row["client_id"], row["customer"]): row["quantity"] for row in rows}

    def _take_stock(self, connection: Connection, verdicts: Sequence[Verdict]) -> list[Door]:
        taken: defaultdict[str, int] = defaultdict(int)
        for verdict in verdicts:
            if verdict.status is Status.RESERVED:
                taken[verdict.purchase.item] += verdict.purchase.quantity
        if not taken:
            return []
        rows = _fetch(connection, sql.TAKE_STOCK, skus=list(taken), taken=list(taken.values()))
        return [Door.from_row(row) for row in rows]

    def _tell(self, lane: int, batch: Batch) -> None:
        self._wait_until_told()
        if len(batch.records) < self._settings.decide_batch:
            # Nobody waits behind them, so nothing is won: the thread would only come between them and their answer.
            self._publish(lane, batch)
        else:
            self._telling = self._teller.submit(copy_context().run, self._publish, lane, batch)

    def _wait_until_told(self) -> None:
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.result()

    def _publish(self, lane: int, batch: Batch) -> None:
        """Tell Redis, in one pipeline, and call the charges. Only logged if it fails: Postgres has it all."""
        calls = [CHARGES_CALL] if batch.reserved else []
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                self._caller.queue_marks(pipe, calls)
                statuses.queue_write(pipe, batch.records, self._settings)
                doors.queue_write(pipe, batch.doors, self._settings, doors.no_longer_waiting(batch.records))
                if batch.decided_through is not None:
                    statuses.queue_watermark(pipe, lane, batch.decided_through)
                replies = pipe.execute()
        except RedisError as error:
            log.warning("batch_not_published", lane=lane, purchases=len(batch.records), error=str(error))
        else:
            self._caller.publish(self._caller.to_publish(calls, replies))
        crash_point("decide.after_publish")

    def _forget_call(self, lane: int) -> None:
        try:
            self._redis.delete(keys.called(queue_of(lane)))
        except RedisError as error:
            # The mark then stands until it expires, which delays the next call; it loses nothing.
            log.warning("call_not_forgotten", lane=lane, error=str(error))


def _locks(settings: Settings) -> dict[tuple[int, bool], str]:
    """`LIMITS` and `LOCK_LANE` in one message, by lane and whether to wait."""
    usual = limits(settings)
    # Until the lock is granted a statement has LOCK_TIMEOUT, and then its usual time (see `LOCK_LANE`).
    first = literal(LIMITS, usual | {"statement": usual["lock"]})
    return {
        (lane, wait): f"{first}; {literal(lock, {'lane': lane, 'statement_timeout': usual['statement']})}"
        for lane in range(settings.lanes)
        for wait, lock in ((True, sql.LOCK_LANE), (False, sql.LOCK_LANE_NOWAIT))
    }


def _fetch(connection: Connection, statement: TextClause, **values: Any) -> Sequence[RowMapping]:
    # At once: an iteration would ask for each row by itself, which costs as much again as the row.
    return connection.execute(statement, values).mappings().all()


def _read(connection: Connection, statement: TextClause, **values: Any) -> Sequence[Row[Any]]:
    # Of hundreds of rows, by the places of their columns: by their names takes three times as long.
    return connection.execute(statement, values).all()


def _array(words: Iterable[str | int | None]) -> str:
    """An array as Postgres reads it, of what needs no quotes: ids, names of states, numbers. psycopg would look at each
    of them, which costs more than to decide them."""
    return f"{{{','.join('NULL' if word is None else str(word) for word in words)}}}"


def _waiting(row: Sequence[Any]) -> Waiting:
    purchase, client, seq, _, _, status, _, item, quantity, customer, *_, accepted = row
    return Waiting(purchase, seq, item, client, customer, quantity, STATUSES[status], accepted)


#: The verdicts that decide: stock, or none. Who waits on, is called off or set aside was not decided.
_DECIDED = frozenset({Status.RESERVED, Status.SOLD_OUT, Status.LIMIT_REACHED})


def _settled(row: Sequence[Any], verdict: Verdict, now: str) -> PurchaseRecord:
    """The purchase that was read as this row, when the verdict has been written."""
    purchase, client, seq, lane, rev, _, _, item, quantity, customer, amount, currency, _, accepted_at, *_ = row
    status = verdict.status
    return PurchaseRecord(
        purchase, client, seq, lane, rev + 1, status, item, quantity, customer, amount, currency, accepted_at,
        reason=verdict.reason,
        decided_at=now if status in _DECIDED else None,
        finished_at=now if status in FINAL else None,
    )  # fmt: skip


def _stock(row: RowMapping, waitlist_end: int | None) -> Stock:
    return Stock(
        sku=row["sku"],
        available=row["available"],
        unpaid=row["unpaid"],
        hold_seconds=row["hold_seconds"],
        waitlist=row["waitlist"],
        per_customer=row["per_customer"],
        opens_at=row["opens_at"],
        closes_at=row["closes_at"],
        waitlist_end=waitlist_end,
    )
