"""From accepted to decided at 30% of the peak: how long a buyer waits when the shop is busy, not drowned."""

from __future__ import annotations

from statistics import median

from ops.bench import lines, traffic
from ops.bench.contest import Contest
from ops.bench.samples import FAIRLANE, Result, Sample, curve_of

NAME = "latency"
PEAK = "peak of accepted per second"
"""The name of a fact."""

_LOAD = 0.3
_SECONDS, _SECONDS_QUICK = 4.0, 1.5
_PEAK_SECONDS = 1.2


def measure(contest: Contest) -> list[Result]:
    """Decided per second, at a rate that is given; the latency is from each 202 to its decision in Redis.

    Everything is up, the payments too. The peak is that of the door with everything behind it at work.
    """
    with contest.site.only(["web", "lanes", "charges", "sweep"]) as site:
        lines.create_items(site, ["hot"], 100_000_000)
        target = traffic.Target(site.url, site.api_key)
        peaks: list[float] = []

        def fairlane() -> Sample:
            lines.wait_until_settled(site)
            at_most = contest.pool.submit(traffic.closed_loop, target, _PEAK_SECONDS).result()
            peaks.append(at_most.count / at_most.seconds)
            lines.wait_until_settled(site)
            rate, seconds = _LOAD * median(peaks), _SECONDS_QUICK if contest.quick else _SECONDS
            usage = site.usage()
            running = contest.pool.submit(traffic.open_loop, target, site.settings.redis_url, rate, seconds)
            measured = running.result()
            used = usage.read()
            cpu, memory = {"load": measured.cpu, **used.cpu}, {"load": measured.memory, **used.memory}
            return Sample(measured.count, measured.seconds, curve_of(measured.latencies), cpu, memory)

        samples = contest.run({FAIRLANE: fairlane})
        # Whoever is put to sleep in the middle of its calls wakes up with all of them in doubt, and stops claiming. To
        # call it again is for the sweep, which may be asleep by then.
        lines.wait_until_settled(site)
    title = "Accepted to decided, one hot item at 30% of the peak"
    return [Result(NAME, title, "purchases decided", samples, {PEAK: median(peaks)})]
