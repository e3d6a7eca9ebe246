"""The audit: what items and lanes say, recomputed from the purchases, and compared with the provider's books.

It only reads, in short transactions, so it may run beside a sale. One statement is one snapshot: whatever is compared
in one statement was true at one moment. Only what is surely wrong is a finding. What cannot be judged yet (a charge
under way, in doubt, or in review) is counted as open.

What is proved of the order within an item, and why not more: `seq` says who came first, but a purchase with a lower
`seq` may be committed after the lane was decided past it, and is then rightly served later. So order is judged only

- between purchases of one commit (the same `accepted_at`, the time of the transaction), or accepted so far apart that
  the first was certainly committed when the second came; and only if it was overtaken by 10 seconds or more;
- in one decision (the same `decided_at`): nobody is refused for want of stock while somebody behind gets as much;
- after a refusal on an item with a waitlist and an unchanged stock: what is left only falls, so nobody may get as
  much later.

Winners lost to a fault (they had stock, and lost it by no doing of theirs and by no word of the provider) are listed
and are no finding. They are final and nobody can mend them, and `FAIRLANE_NOT_CHARGED=decline` and short holds make
them a policy: an audit that failed for them once would fail for ever, and hide what goes wrong from then on.

The order of times is Postgres' clock's. One that was set back by more than a second during a sale makes findings of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from psycopg import errors as postgres
from sqlalchemy import RowMapping, TextClause, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

from ops import audit_statements as statements
from ops.audit_stuck import Read, find_stuck
from shared.database import check_lanes, make_async_engine
from shared.errors import SettingsError, UnavailableError
from shared.routing import lane_of
from shared.settings import Settings
from shared.states import AWAITING_OUTCOME, Status
from workers.gateways import ChargeRecord, Gateway, GatewayUnavailable, load_gateway

#: Items in one statement: it reads their purchases, so a thousand keep it well under the bound below.
_ITEMS = 1_000
#: Purchases asked about in one batch, and questions on the way at once: a provider is not flooded by an audit.
_ASKED, _QUESTIONS = 500, 8
#: Times a question is repeated: an idle connection may be closed just as it is used.
_TRIES = 3
#: Purchases in one statement that judges each by itself: a fraction of a second.
_RANGE = 100_000
#: Bound of one statement: an old snapshot slows the sale down, so none is kept for longer. With a million purchases the
#: longest, of order, takes a few seconds.
_STATEMENT_TIMEOUT = "30s"
#: Seconds after which a server that does not end such a statement itself is hung up on.
_HELD_FOR = 45.0
#: For sorts: at Postgres' default of 4 MB they would go to the disk, and the snapshot would grow old meanwhile.
_WORK_MEM = "64MB"
#: Seconds that no transaction of ours outlives: those that accept purchases and change items have three statements,
#: each with its pause; five leave room for the commit. A minute at least, however short the timeouts are.
_TURNS, _APART = 5, 60.0
_LIMITS = text("""
SELECT set_config('statement_timeout', :statement, true), set_config('work_mem', :memory, true)
""")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is surely wrong: which check, of which item or purchase (32 hex digits), and what was seen."""

    check: str
    subject: str
    detail: str


@dataclass(frozen=True, slots=True)
class ItemAudit:
    """One item as it says of itself, with what its purchases say: units held unpaid, and units sold."""

    sku: str
    stock: int
    available: int
    unpaid: int
    sold: int
    held_by_purchases: int
    sold_by_purchases: int

    @property
    def oversold(self) -> int:
        """Units promised or sold beyond the stock."""
        return max(0, self.held_by_purchases + self.sold_by_purchases - self.stock)


@dataclass(frozen=True, slots=True)
class ProviderAudit:
    """What the provider's books say. The lists name purchases."""

    asked: int
    charged_twice: tuple[str, ...]
    paid_but_unconfirmed: tuple[str, ...]
    open: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Everything the audit saw. `findings` is empty when all is well. `winners_lost` names purchases, oldest first."""

    items: tuple[ItemAudit, ...]
    purchases: dict[str, int]
    provider: ProviderAudit
    winners_lost: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is surely wrong."""
        return not self.findings

    @property
    def sold(self) -> int:
        """Units sold, by the purchases."""
        return sum(item.sold_by_purchases for item in self.items)

    @property
    def oversold(self) -> int:
        """Units promised or sold beyond the stock, over all items."""
        return sum(item.oversold for item in self.items)


class AuditIncompleteError(UnavailableError):
    """The audit could not see everything: the payment provider did not answer, or a statement took too long."""


async def audit(settings: Settings) -> AuditReport:
    """Audit everything. Needs `payment_url`.

    Raises SettingsError for a database that is not laid out for these settings, AuditIncompleteError when the provider
    does not answer or Postgres takes too long: an audit that saw half is no audit.
    """
    if settings.payment_url is None:
        raise SettingsError("FAIRLANE_PAYMENT_URL: is not set")
    gateway = load_gateway(
        settings.gateway, url=settings.payment_url, call_timeout=settings.call_timeout, connections=_QUESTIONS
    )
    engine = make_async_engine(settings, held_for=_HELD_FOR)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(check_lanes, settings.lanes)
        read = partial(_read, engine)
        end = (await read(statements.END))[0]["seq"]
        findings: list[Finding] = []
        items = [item async for item in _items(read, settings, findings)]
        findings += [finding async for finding in _check(read, settings, end)]
        findings += [Finding("stuck", stuck.purchase, stuck.detail) for stuck in await find_stuck(read, settings)]
        provider = await _ask_provider(read, gateway, end, findings)
        return AuditReport(
            items=tuple(items),
            purchases={row["status"]: row["purchases"] for row in await read(statements.COUNTS)},
            provider=provider,
            winners_lost=tuple([row["id"].hex for row in await read(statements.WINNERS_LOST)]),
            findings=tuple(findings),
        )
    finally:
        await gateway.close()
        await engine.dispose()


async def _check(read: Read, settings: Settings, end: int) -> AsyncIterator[Finding]:
    """What the purchases say of themselves and of each other."""
    ranges = [window async for window in _ranges(read, end)]
    for check, statement in statements.BY_RANGE:
        for after, upto in ranges:
            for row in await read(statement, after=after, upto=upto):
                yield Finding(check, _subject(row["subject"]), row["detail"])
    apart = max(_APART, _TURNS * (settings.statement_timeout + settings.idle_in_transaction_timeout))
    for check, statement in statements.BY_ITEM:
        for row in await read(statement, apart=apart):
            yield Finding(check, _subject(row["subject"]), row["detail"])


async def _ranges(read: Read, end: int) -> AsyncIterator[tuple[int, int]]:
    """All purchases up to `end`, as ranges of `seq`: after, up to."""
    after = 0
    while (upto := (await read(statements.RANGE, after=after, end=end, batch=_RANGE))[0]["upto"]) is not None:
        yield after, upto
        after = upto


async def _items(read: Read, settings: Settings, findings: list[Finding]) -> AsyncIterator[ItemAudit]:
    after = ""
    while rows := await read(statements.ITEMS, after=after, batch=_ITEMS):
        after = rows[-1]["sku"]
        for row in rows:
            item = ItemAudit(
                sku=row["sku"],
                stock=row["stock"],
                available=row["available"],
                unpaid=row["unpaid"],
                sold=row["stock"] - row["available"] - row["unpaid"],
                held_by_purchases=row["held"],
                sold_by_purchases=row["sold"],
            )
            findings += _judge_item(item)
            if row["lane"] != (lane := lane_of(item.sku, settings.lanes)):
                findings.append(Finding("item lane", item.sku, f"is in lane {row['lane']}, its name says {lane}"))
            yield item


def _judge_item(item: ItemAudit) -> Iterable[Finding]:
    if item.available < 0 or item.unpaid < 0 or item.sold < 0:
        said = f"available {item.available}, held {item.unpaid}, sold {item.sold}"
        yield Finding("negative stock", item.sku, said)
    if item.unpaid != item.held_by_purchases:
        yield Finding("held stock", item.sku, f"says {item.unpaid}, its purchases hold {item.held_by_purchases}")
    if item.sold != item.sold_by_purchases:
        yield Finding("sold stock", item.sku, f"says {item.sold}, its purchases bought {item.sold_by_purchases}")
    if item.oversold:
        given = item.held_by_purchases + item.sold_by_purchases
        yield Finding("oversold", item.sku, f"{given} units held and sold of a stock of {item.stock}")


async def _ask_provider(read: Read, gateway: Gateway, end: int, findings: list[Finding]) -> ProviderAudit:
    """Compare every purchase that may ever have been claimed with what the provider has on its books."""
    asked = after = 0
    twice: list[str] = []
    unconfirmed: list[str] = []
    still_open: list[str] = []
    limit = asyncio.Semaphore(_QUESTIONS)
    while rows := await read(statements.CHARGED, after=after, end=end, batch=_ASKED):
        after = rows[-1]["seq"]
        asked += len(rows)
        answers = await asyncio.gather(*(_find(gateway, row["id"].hex, limit) for row in rows))
        # Whoever moved on since it was read is judged by where it stands now, with a later answer.
        doubtful = {row["id"] for row, found in zip(rows, answers, strict=True) if not _agrees(row, found)}
        again = await read(statements.CHARGED_BY_ID, ids=list(doubtful)) if doubtful else []
        repeated = await asyncio.gather(*(_find(gateway, row["id"].hex, limit) for row in again))
        revs = {row["id"]: row["rev"] for row in rows}
        settled = [(row, found) for row, found in zip(rows, answers, strict=True) if row["id"] not in doubtful]
        for row, found in zip(again, repeated, strict=True):
            if row["rev"] != revs[row["id"]] and row["status"] == Status.RESERVED:
                still_open.append(row["id"].hex)  # It moves too fast: it may have been claimed again meanwhile.
            else:
                settled.append((row, found))
        for row, found in settled:
            purchase, status = row["id"].hex, Status(row["status"])
            paid = [charge.id for charge in found if charge.status == "succeeded"]
            if len(paid) > 1:
                twice.append(purchase)
                findings.append(Finding("charged twice", purchase, f"the provider has {', '.join(paid)}"))
            elif status in AWAITING_OUTCOME:
                still_open.append(purchase)
            elif status is Status.CONFIRMED and paid != [row["charge_id"]]:
                seen = f"the provider has {paid[0]}" if paid else "the provider has no charge"
                findings.append(Finding("confirmed, not charged", purchase, f"says {row['charge_id']}, {seen}"))
            elif status is not Status.CONFIRMED and paid:
                unconfirmed.append(purchase)
                findings.append(Finding("paid but unconfirmed", purchase, f"is {status}, charged as {paid[0]}"))
    return ProviderAudit(asked, tuple(twice), tuple(unconfirmed), tuple(still_open))


def _agrees(row: RowMapping, found: Sequence[ChargeRecord]) -> bool:
    paid = [charge.id for charge in found if charge.status == "succeeded"]
    if row["status"] == Status.CONFIRMED:
        return paid == [row["charge_id"]]
    return not paid and row["status"] not in AWAITING_OUTCOME


async def _find(gateway: Gateway, reference: str, limit: asyncio.Semaphore) -> list[ChargeRecord]:
    async with limit:
        for attempt in range(1, _TRIES + 1):
            try:
                return await gateway.find(reference)
            except GatewayUnavailable as error:
                if attempt == _TRIES:
                    raise AuditIncompleteError(f"the audit is not complete: {error}") from error
    raise AssertionError("unreachable")


async def _read(engine: AsyncEngine, statement: TextClause, **values: object) -> Sequence[RowMapping]:
    async with engine.begin() as connection:
        await connection.execute(text("SET TRANSACTION READ ONLY"))
        await connection.execute(_LIMITS, {"statement": _STATEMENT_TIMEOUT, "memory": _WORK_MEM})
        try:
            return (await connection.execute(statement, values)).mappings().all()
        except OperationalError as error:
            if isinstance(error.orig, postgres.QueryCanceled):
                raise AuditIncompleteError(
                    f"the audit is not complete: Postgres took longer than {_STATEMENT_TIMEOUT} for one question"
                ) from error
            raise


def _subject(value: object) -> str:
    return value.hex if isinstance(value, UUID) else str(value)
