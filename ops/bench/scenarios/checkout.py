"""Whole checkouts of one hot item with a 50 ms payment: over HTTP here, as each peer does it there."""

from __future__ import annotations

from ops.bench import lines, selling, traffic
from ops.bench.buyers import LOCK, PROMPT_LOCK, ROW_LOCK, UPDATE, Demand
from ops.bench.contest import Contest
from ops.bench.samples import FAIRLANE, Result, Sample, curve_of
from ops.bench.site import SiteError

NAME = "checkout"
#: Peers sell this long. With a payment inside the lock, their buyers then still wait for each other.
_PEER_SECONDS = 0.8
_TASKS = 30
#: Without the ten segments: with the payment outside of it, an UPDATE is not what anybody waits for.
_PEERS = (LOCK, PROMPT_LOCK, ROW_LOCK, UPDATE)
#: Buyers under way at once, for so many seconds. Each asks twice, as often as it is told to (`Retry-After: 1`), so so
#: many are what 900 checkouts a second need.
_BUYERS, _SECONDS, _SECONDS_QUICK = 2_000, 7.5, 4.2
_PAUSE = 1.0
PAUSES = 2 * _PAUSE
"""Seconds of each checkout in which a buyer waits to ask, as it is told to."""
_CONNECTIONS = 128

_CONFIRMED = "SELECT count(*) FROM fairlane.purchases WHERE status = 'confirmed'"


def measure(contest: Contest) -> list[Result]:
    """Paid for per second. The latency is from the first request to knowing that it is paid for."""
    with (
        contest.site.only(["web", "lanes", "charges", "sweep"]) as site,
        selling.by_task(contest, site, _TASKS, paid=True) as by_task,
    ):
        lines.create_items(site, ["hot"], 100_000_000)
        target = traffic.Target(site.url, site.api_key, connections=_CONNECTIONS)
        seconds = _SECONDS_QUICK if contest.quick else _SECONDS
        demand = Demand(["hot"], seconds=_PEER_SECONDS)

        def fairlane() -> Sample:
            usage = site.usage()
            before = site.number(_CONFIRMED)
            running = contest.pool.submit(traffic.checkouts, target, _BUYERS, seconds, _PAUSE)
            measured = running.result()
            lines.wait_until_settled(site)
            used = usage.read()
            if set(measured.ends) != {"confirmed"}:
                raise SiteError(f"checkouts that did not end as confirmed: {dict(measured.ends)}")
            # What was used is for all of them, what is counted for those in the middle of the run.
            share = measured.count / (site.number(_CONFIRMED) - before)
            cpu = {name: spent * share for name, spent in {"load": measured.cpu, **used.cpu}.items()}
            memory = {"load": measured.memory, **used.memory}
            return Sample(measured.count, measured.seconds, curve_of(measured.latencies), cpu, memory)

        samples = contest.run(
            {
                **selling.peers(contest, site, demand, paid=True, chosen=contest.chosen(_PEERS, quick=(LOCK,))),
                **by_task,
                FAIRLANE: fairlane,
            }
        )
    return [Result(NAME, "One hot item, 50 ms payment", "purchases paid for", samples)]
