"""The audit: what items and lanes say, recomputed from the purchases, and compared with the provider's books.

It only reads, in short transactions, so it may run beside a sale. One statement is one snapshot: whatever is compared
in one statement was true at one moment. Only what is surely wrong is a finding. What cannot be judged yet (a charge
under way, in doubt, or in review) is counted as open.

What is proved of the order within an item, and why not more: `seq` says who came first, but a purchase with a lower
`seq` may be committed after the lane was decided past it, and is then rightly served later. So order is judged only

- between purchases of one commit (the same `accepted_at`, the time of the transaction), or accepted so far apart that
  the first was certainly committed when the second came;
- in one decision (the same `decided_at`): nobody is refused for want of stock while somebody behind gets as much;
- after a refusal on an item with a waitlist and an unchanged stock: what is left only falls, so nobody may get as
  much later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy import RowMapping, TextClause, text
from sqlalchemy.ext.asyncio import AsyncEngine

from ops import audit_statements as statements
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
#: Bound of one statement, in milliseconds: an old snapshot slows the sale down, so none is kept for longer.
_STATEMENT_TIMEOUT = 60_000


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
    """Everything the audit saw. `findings` is empty when all is well."""

    items: tuple[ItemAudit, ...]
    purchases: dict[str, int]
    provider: ProviderAudit
    findings: tuple[Finding, ...] = field(default=())

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
    """The audit could not see everything: the payment provider did not answer."""


async def audit(settings: Settings) -> AuditReport:
    """Audit everything. Needs `payment_url`.

    Raises SettingsError for a database that is not laid out for these settings, AuditIncompleteError when the provider
    does not answer: an audit that saw half is no audit.
    """
    if settings.payment_url is None:
        raise SettingsError("FAIRLANE_PAYMENT_URL: is not set")
    gateway = load_gateway(
        settings.gateway, url=settings.payment_url, call_timeout=settings.call_timeout, connections=_QUESTIONS
    )
    engine = make_async_engine(settings)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(check_lanes, settings.lanes)
        findings: list[Finding] = []
        items = [item async for item in _items(engine, settings, findings)]
        for check, statement in statements.CHECKS.items():
            rows = await _read(engine, statement)
            findings += [Finding(check, _subject(row["subject"]), row["detail"]) for row in rows]
        provider = await _ask_provider(engine, gateway, findings)
        counts = {row["status"]: row["purchases"] for row in await _read(engine, statements.COUNTS)}
        return AuditReport(tuple(items), counts, provider, tuple(findings))
    finally:
        await gateway.close()
        await engine.dispose()


async def _items(engine: AsyncEngine, settings: Settings, findings: list[Finding]) -> AsyncIterator[ItemAudit]:
    after = ""
    while rows := await _read(engine, statements.ITEMS, after=after, batch=_ITEMS):
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


async def _ask_provider(engine: AsyncEngine, gateway: Gateway, findings: list[Finding]) -> ProviderAudit:
    """Compare every purchase that was ever claimed for charging with what the provider has on its books."""
    asked = after = 0
    twice: list[str] = []
    unconfirmed: list[str] = []
    still_open: list[str] = []
    limit = asyncio.Semaphore(_QUESTIONS)
    while rows := await _read(engine, statements.CHARGED, after=after, batch=_ASKED):
        after = rows[-1]["seq"]
        asked += len(rows)
        answers = await asyncio.gather(*(_find(gateway, row["id"].hex, limit) for row in rows))
        # Whoever moved on since it was read is judged by where it stands now, with a later answer.
        doubtful = {row["id"] for row, found in zip(rows, answers, strict=True) if not _agrees(row, found)}
        again = await _read(engine, statements.CHARGED_BY_ID, ids=list(doubtful)) if doubtful else []
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
        await connection.execute(text(f"SET LOCAL statement_timeout = {_STATEMENT_TIMEOUT}"))
        return (await connection.execute(statement, values)).mappings().all()


def _subject(value: object) -> str:
    return value.hex if isinstance(value, UUID) else str(value)
