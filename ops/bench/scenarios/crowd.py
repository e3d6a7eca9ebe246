"""A crowd of which 95% find it sold out: everybody comes at once, and wants an answer."""

from __future__ import annotations

from functools import partial

from ops.bench import lines, selling, traffic
from ops.bench.buyers import LOCK, THREADS, UPDATE, Demand
from ops.bench.contest import Contest
from ops.bench.samples import FAIRLANE, Contender, Result, Sample, curve_of
from ops.bench.site import SiteError

NAME = "crowd"
_BUYERS, _BUYERS_QUICK = 2_000, 1_000
#: One of so many buyers gets one.
_SHARE = 20
_CONNECTIONS = 256
#: What is given up, and the best there is.
_PEERS = (LOCK, UPDATE)


def measure(contest: Contest) -> list[Result]:
    """Answered per second, without a payment: accepted, or told that it is sold out; peers answer those they can."""
    buyers = contest.scaled(_BUYERS, _BUYERS_QUICK)
    stock = buyers // _SHARE
    with contest.site.only(["web", "lanes"]) as site:
        number = iter(range(1_000_000))

        def fairlane() -> Sample:
            sku = f"crowd-{next(number)}"
            lines.create_items(site, [sku], stock)
            target = traffic.Target(site.url, site.api_key, sku=sku, connections=_CONNECTIONS)
            usage = site.usage()
            measured = contest.pool.submit(traffic.crowd, target, buyers).result()
            used = usage.read()
            sold = "SELECT count(*) FROM fairlane.purchases WHERE item = %s AND status = 'reserved'"
            site.wait(lambda: site.number(sold, sku) == stock, f"all {stock} to be sold")
            # A full queue (503) is an answer too: those who wait already want all that is left.
            if unwanted := measured.statuses.keys() - {202, 409, 503}:
                raise SiteError(f"answers that nobody expected: {unwanted}")
            cpu, memory = {"load": measured.cpu, **used.cpu}, {"load": measured.memory, **used.memory}
            return Sample(buyers, measured.seconds, curve_of(measured.latencies), cpu, memory)

        demand = Demand(["hot"], tries=buyers)
        peers = {
            Contender(peer.name): partial(selling.sell, contest, site, peer, demand, paid=False, stock=stock)
            for peer in contest.chosen(_PEERS, quick=())
        }
        samples = contest.run({**peers, FAIRLANE: fairlane})
    title = f"{buyers:,} buyers for {stock}: {THREADS} threads of a peer, {_CONNECTIONS} connections of ours"
    return [Result(NAME, title, "buyers answered", samples)]
