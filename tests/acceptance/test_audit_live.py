"""The audit beside a sale: it never takes what is merely under way for drift."""

from __future__ import annotations

import asyncio
from collections import Counter

from ops.audit import AuditReport, audit
from shared import keys
from shared.settings import Settings
from tests.acceptance.service import Service
from tests.acceptance.shop import Shop

#: Audits that must have seen purchases on their way: fewer would be chance.
AUDITS_UNDER_WAY = 4
#: Buyers in a wave. Small ones, one after another: an audit asks the provider about every purchase there was.
WAVE = 16
#: Waves come until enough audits were made beside them, and at most so many: a minute of them. At least so many:
#: whoever bought of the limited item in the first meets the limit in the second.
WAVES, LEAST_WAVES, WAVE_EVERY = 120, 2, 0.5
UNDER_WAY = ("queued", "waitlisted", "reserved", "charging")


async def test_no_audit_beside_a_running_sale_finds_anything(service: Service, shop: Shop, sku: str) -> None:
    settings = Settings.model_validate(
        {name.removeprefix("FAIRLANE_").lower(): value for name, value in service.environment.items()}
    )
    hot, plain, limited = f"{sku}-hot", f"{sku}-plain", f"{sku}-limited"
    stock = WAVE // 4
    await shop.put_item(hot, stock=stock)
    await refuse_somebody(service, shop, plain)
    await shop.put_item(limited, stock=10_000, per_customer=3)

    reports: list[AuditReport] = []
    over = asyncio.Event()

    async def audit_again_and_again() -> None:
        while not over.is_set():
            reports.append(await audit(settings))

    def saw_it_all() -> bool:
        """Enough audits with purchases on their way; among them a waitlist, and a call of which nobody could tell."""
        under_way = [report for report in reports if any(report.purchases.get(status) for status in UNDER_WAY)]
        waitlist = any(report.purchases.get("waitlisted") for report in reports)
        calls = any(report.provider.open for report in reports)
        return len(under_way) >= AUDITS_UNDER_WAY and waitlist and calls

    async def sell() -> list[str]:
        """Waves of buyers, and a restock with each; a third of the cards is declined, and some are slow: they keep
        others on the waitlist, and calls open, for seconds."""
        ids: list[str] = []
        for wave in range(WAVES):
            if auditing.done() or (wave >= LEAST_WAVES and saw_it_all()):
                break
            orders = [
                shop.buy_insisting(
                    (hot, hot, plain, limited)[number % 4],
                    token="tok_fault_slow" if number % 8 == 1 else "tok_declined" if number % 3 == 0 else "tok_visa",
                    customer=f"c-{number % 7}",
                    quantity=1 + number // 4 % 2,
                )
                for number in range(WAVE)
            ]
            *replies, hotter, plainer = await asyncio.gather(
                *orders,
                shop.put_item(hot, stock=stock * (wave + 2)),
                # Others are now given as much as somebody was refused before: both are right.
                shop.put_item(plain, stock=100 + stock * wave),
            )
            assert (hotter.status, plainer.status) == (200, 200)
            assert {reply.status for reply in replies} <= {202, 409}
            ids += [reply.body["id"] for reply in replies if reply.status == 202]
            await asyncio.sleep(WAVE_EVERY)
        # No restock after this: whoever is on a waitlist is served or finds it sold out, as the last holds end.
        return ids

    auditing = asyncio.create_task(audit_again_and_again())
    try:
        ids = await sell()
        outcomes = Counter([bought["status"] for bought in await asyncio.gather(*map(shop.final, ids))])
    finally:
        over.set()
        await auditing

    assert saw_it_all(), "the audits came when nothing was on its way"
    assert [report.findings for report in reports if not report.ok] == []
    assert {"confirmed", "declined", "limit_reached"} <= outcomes.keys(), "the sale was not what this test needs"
    last = await audit(settings)
    assert last.ok, last.findings
    assert not set(ids) & set(last.winners_lost)


async def refuse_somebody(service: Service, shop: Shop, sku: str) -> None:
    """Make an item without a waitlist, and let a purchase of two be accepted and then found sold out."""
    for burst in range(1, 21):
        await shop.put_item(sku, stock=2 * burst, waitlist=False)
        # The door lets nobody in who would find it sold out, unless it counts too few: as after a flush in mid-sale,
        # and here by far. Who comes after the first was decided is refused all the same: so all come at once.
        with service.redis() as redis:
            redis.set(keys.waiting(sku), -1_000)
        replies = await asyncio.gather(*(shop.buy_insisting(sku, quantity=2) for _ in range(8)))
        ids = [reply.body["id"] for reply in replies if reply.status == 202]
        if any(bought["status"] == "sold_out" for bought in await asyncio.gather(*map(shop.final, ids))):
            return
    raise AssertionError("nobody was refused")
