"""A line of 1,000 against lines of 100,000 and 1,000,000: how fast they are decided, and what a queued purchase costs.

The long line and the short one have servers and workers of their own, so that they share no table; in a quick run only
a lane each.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime

import msgspec

from ops.bench import lines
from ops.bench.contest import Contest
from ops.bench.samples import Contender, Result, Sample
from ops.bench.site import Site
from shared import keys, statuses
from shared.purchases import PurchaseRecord, rfc3339
from shared.routing import lane_of
from shared.states import Status

NAME = "backlog"
SHORT = 1_000
LENGTHS, LENGTHS_QUICK = (100_000, 1_000_000), (20_000,)
POSTGRES, REDIS = "bytes in Postgres, {}", "bytes in Redis, {}"
"""Names of facts: bytes per queued purchase, at a line's length."""

#: Decided in one round of a long line, when it is still nearly as long as before.
_DECIDED, _DECIDED_QUICK = 8_000, 2_000
#: Short lines in a round: one is over in a tenth of a second.
_SHORT_LINES = 2
#: Statuses written at once.
_WRITTEN = 1_000
#: A million commands of their own would take longer than all else here.
_SET_ALL = "for _, key in ipairs(KEYS) do redis.call('SET', key, ARGV[1], 'EX', ARGV[2]) end"
_SKU, _LONG = "backlog", "backlog-long"
_TABLE_BYTES = """
SELECT pg_total_relation_size('fairlane.purchases') + pg_total_relation_size('fairlane.purchase_keys')
"""


def of_length(purchases: int) -> Contender:
    """Fairlane with so many purchases queued."""
    return Contender(f"{purchases:,} queued", ours=True)


def measure(contest: Contest) -> list[Result]:
    """Decided per second at each length, with the short line in the same rounds; bytes per queued purchase as facts."""
    results: list[Result] = []
    with contest.site.only(["lanes"]) as short, nullcontext(short) if contest.quick else Site(["lanes"]) as long:
        if long is not short:
            lines.warm_up(long)
        lines.create_items(short, [_SKU], 100_000_000)
        lines.create_items(long, [_LONG], 100_000_000)
        facts = _queue_measured(short, _SKU, SHORT, SHORT)
        lines.decide(short, [_SKU], SHORT)
        queued = 0
        # Whoever decides the long line is stopped by holding its lane.
        for length in LENGTHS_QUICK if contest.quick else LENGTHS:
            contest.say(f"queueing {length:,} purchases")
            facts |= _queue_measured(long, _LONG, length - queued, length)
            decided = contest.scaled(_DECIDED, _DECIDED_QUICK)
            queued = length - contest.rounds * decided

            def decide_long(decided: int = decided) -> Sample:
                long.let_go()
                return lines.decide_some(long, _LONG, decided)

            found = contest.run({of_length(SHORT): lambda: _decide_short(short), of_length(length): decide_long})
            long.let_go()
            results.append(Result(f"{NAME}-{length}", f"A line of {length:,}", "purchases decided", found, facts))
    return results


def _decide_short(site: Site) -> Sample:
    """Some lines one after another, each of a batch more than what is measured: the pace is from batch to batch."""
    purchases = SHORT + site.settings.decide_batch
    decided = []
    for _ in range(_SHORT_LINES):
        lines.queue_purchases(site, [_SKU], purchases)
        decided.append(lines.decide_whole(site, _SKU, purchases))
    return Sample(
        sum(each.count for each in decided),
        sum(each.seconds for each in decided),
        cpu={name: sum(each.cpu[name] for each in decided) for name in decided[0].cpu},
        memory=decided[-1].memory,
    )


def _queue_measured(site: Site, sku: str, purchases: int, length: int) -> dict[str, float]:
    """Queue so many purchases, in Postgres and, beside that, with what the door and the clients need in Redis."""
    table, memory = site.number(_TABLE_BYTES), _redis_bytes(site)
    with ThreadPoolExecutor(1) as beside:
        queueing = beside.submit(lines.queue_purchases, site, [sku], purchases)
        _fill_redis(site, sku, purchases, length)
        queueing.result()
    return {
        POSTGRES.format(f"{length:,}"): (site.number(_TABLE_BYTES) - table) / purchases,
        REDIS.format(f"{length:,}"): (_redis_bytes(site) - memory) / purchases,
    }


def _fill_redis(site: Site, sku: str, purchases: int, length: int) -> None:
    lane, accepted_at = lane_of(sku, site.settings.lanes), rfc3339(datetime.now(UTC))
    record = PurchaseRecord(
        "", "bench", length, lane, 1, Status.QUEUED, sku, 1, f"c-{length}", 2_500, "EUR", accepted_at
    )
    for written in range(0, purchases, _WRITTEN):
        ids = [f"{length:016x}{number:016x}" for number in range(written, min(written + _WRITTEN, purchases))]
        with site.redis.pipeline(transaction=False) as pipe:
            statuses.queue_write(pipe, [msgspec.structs.replace(record, id=each) for each in ids], site.settings)
            seen = [keys.seen("bench", each) for each in ids]
            pipe.eval(_SET_ALL, len(seen), *seen, f"1 1 {keys.waiting(sku)}", 3_600)
            pipe.execute()


def _redis_bytes(site: Site) -> int:
    return int(site.redis.info("memory")["used_memory"])
