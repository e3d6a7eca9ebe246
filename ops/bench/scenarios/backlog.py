"""A line of 1,000 against lines of 100,000 and 1,000,000: how fast they are decided, and what a queued purchase costs.

The long line and the short one have servers and workers of their own, so that they share no table; in a quick run only
a lane each.
"""

from __future__ import annotations

from contextlib import nullcontext

import msgspec
from sqlalchemy import text

from ops.bench import lines
from ops.bench.contest import Contest
from ops.bench.samples import Contender, Result, Sample
from ops.bench.site import Site
from shared import keys, statuses
from shared.database import make_engine
from shared.purchases import COLUMNS, PurchaseRecord

NAME = "backlog"
SHORT = 1_000
LENGTHS, LENGTHS_QUICK = (100_000, 1_000_000), (20_000,)
POSTGRES, REDIS = "bytes in Postgres, {}", "bytes in Redis, {}"
"""Names of facts: bytes per queued purchase, at a line's length."""

#: Decided in one round of a long line, when it is still nearly as long as before.
_DECIDED, _DECIDED_QUICK = 10_000, 2_000
#: Statuses written at once.
_WRITTEN = 1_000
#: A million commands of their own would take longer than all else here.
_SET_ALL = "for _, key in ipairs(KEYS) do redis.call('SET', key, ARGV[1], 'EX', ARGV[2]) end"
_SKU, _LONG = "backlog", "backlog-long"
_TABLE_BYTES = """
SELECT pg_total_relation_size('fairlane.purchases') + pg_total_relation_size('fairlane.purchase_keys')
"""
_QUEUED = text(f"SELECT {COLUMNS} FROM fairlane.purchases p WHERE p.status = 'queued' LIMIT 1")  # noqa: S608


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
        lines.decide_whole(short, _SKU, SHORT)
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
    lines.queue_purchases(site, [_SKU], SHORT)
    return lines.decide_whole(site, _SKU, SHORT)


def _queue_measured(site: Site, sku: str, purchases: int, length: int) -> dict[str, float]:
    """Queue so many purchases, in Postgres and with what the door and the clients need in Redis."""
    table, memory = site.number(_TABLE_BYTES), _redis_bytes(site)
    lines.queue_purchases(site, [sku], purchases)
    engine = make_engine(site.settings)
    with engine.connect() as connection:
        record = PurchaseRecord.from_row(connection.execute(_QUEUED).mappings().one())
    engine.dispose()
    for written in range(0, purchases, _WRITTEN):
        ids = [f"{length:016x}{number:016x}" for number in range(written, min(written + _WRITTEN, purchases))]
        with site.redis.pipeline(transaction=False) as pipe:
            statuses.queue_write(pipe, [msgspec.structs.replace(record, id=each) for each in ids], site.settings)
            seen = [keys.seen("bench", each) for each in ids]
            pipe.eval(_SET_ALL, len(seen), *seen, f"1 1 {keys.waiting(sku)}", 3_600)
            pipe.execute()
    return {
        POSTGRES.format(f"{length:,}"): (site.number(_TABLE_BYTES) - table) / purchases,
        REDIS.format(f"{length:,}"): (_redis_bytes(site) - memory) / purchases,
    }


def _redis_bytes(site: Site) -> int:
    return int(site.redis.info("memory")["used_memory"])
