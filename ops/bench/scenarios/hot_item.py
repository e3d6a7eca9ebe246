"""One hot item without a payment: how many purchases a second can be settled."""

from __future__ import annotations

from functools import partial

from ops.bench import lines, selling, sql_loop
from ops.bench.buyers import Demand
from ops.bench.contest import Contest
from ops.bench.samples import FAIRLANE, Contender, Result, Sample

NAME = "hot-item"
SQL_LOOP = Contender("SQL loop", limit=True)

SECONDS = 0.5
PURCHASES, PURCHASES_QUICK = 20_000, 4_000
TASKS = 200


def measure(contest: Contest) -> list[Result]:
    """Settled per second: peers sell to buyers who ask again and again; Fairlane and the SQL loop settle a line."""
    purchases = contest.scaled(PURCHASES, PURCHASES_QUICK)
    with contest.site.only(["lanes"]) as site, selling.by_task(contest, site, TASKS, paid=False) as by_task:
        number = iter(range(1_000_000))

        def a_line() -> str:
            sku = f"hot-{next(number)}"
            lines.create_items(site, [sku], purchases)
            lines.queue_purchases(site, [sku], purchases)
            return sku

        def fairlane() -> Sample:
            sku = a_line()
            return lines.decide(site, [sku], purchases)

        def sql() -> Sample:
            return lines.decide_alone(site, purchases, partial(sql_loop.decide_with_sql, site.libpq_url, a_line()))

        samples = contest.run(
            {
                **selling.peers(contest, site, Demand(["hot"], seconds=SECONDS), paid=False),
                **by_task,
                FAIRLANE: fairlane,
                SQL_LOOP: sql,
            }
        )
    return [Result(NAME, "One hot item, no payment", "purchases settled", samples)]
