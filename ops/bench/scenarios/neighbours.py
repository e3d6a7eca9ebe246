"""A hot lane beside a quiet one: what the buyers of a quiet item notice of a crowd at another."""

from __future__ import annotations

from ops.bench import lines, traffic
from ops.bench.contest import Contest
from ops.bench.samples import Contender, Result, Sample, curve_of
from shared.routing import lane_of

NAME = "neighbours"
ALONE = Contender("the quiet lane alone", ours=True)
BESIDE = Contender("the quiet lane beside a hot one", ours=True)

#: Purchases a second of the quiet item.
_RATE = 40.0
_SECONDS, _SECONDS_QUICK = 3.5, 1.2
#: Queued in the hot lane before each round: more than can be decided in it.
_LINE, _LINE_QUICK = 80_000, 25_000
_NO_LINE = "DELETE FROM fairlane.purchases WHERE status = 'queued' AND item = %(sku)s"
_QUEUED = "SELECT count(*) FROM fairlane.purchases WHERE status = 'queued'"


def measure(contest: Contest) -> list[Result]:
    """Decided per second, at a rate that is given; the latency is from each 202 to its decision in Redis."""
    with contest.site.only(["web", "lanes", "sweep"]) as site:
        hot = "hot"
        quiet = next(
            sku
            for sku in (f"quiet-{number}" for number in range(1_000))
            if lane_of(sku, site.settings.lanes) != lane_of(hot, site.settings.lanes)
        )
        lines.create_items(site, [hot, quiet], 100_000_000)
        target = traffic.Target(site.url, site.api_key, sku=quiet, connections=16)
        seconds = _SECONDS_QUICK if contest.quick else _SECONDS

        def run() -> Sample:
            usage = site.usage()
            running = contest.pool.submit(traffic.open_loop, target, site.settings.redis_url, _RATE, seconds)
            measured = running.result()
            used = usage.read()
            cpu, memory = {"load": measured.cpu, **used.cpu}, {"load": measured.memory, **used.memory}
            return Sample(measured.count, measured.seconds, curve_of(measured.latencies), cpu, memory)

        def alone() -> Sample:
            # What is left of the hot line would take as long again as all rounds together.
            site.connection.execute(_NO_LINE, {"sku": hot})
            site.wait(lambda: site.number(_QUEUED) == 0, "the end of the hot line")
            return run()

        def beside() -> Sample:
            lines.queue_purchases(site, [hot], contest.scaled(_LINE, _LINE_QUICK))
            site.call(lines.lanes_of(site, [hot]))
            return run()

        samples = contest.run({ALONE: alone, BESIDE: beside})
    return [Result(NAME, "A hot lane beside a quiet one", "purchases of the quiet item decided", samples)]
