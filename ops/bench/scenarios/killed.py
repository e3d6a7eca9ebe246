"""`kill -9` of the process that decides a busy lane: how long until the lane's next decision."""

from __future__ import annotations

import time
from statistics import median

import psutil

from ops.bench import lines
from ops.bench.contest import Contest
from ops.bench.samples import Contender, Result, Sample, curve_of
from ops.bench.site import Site, SiteError
from shared.routing import lane_of

NAME = "killed"
MEDIAN, LONGEST = "median gap", "longest gap"
"""Names of facts, in seconds."""

_SKU = "hot"
_LINE, _LINE_QUICK = 100_000, 30_000
_KILLS_PER_ROUND, _KILLS_QUICK = 3, 1
#: Between two kills, until a new process stands in for the last one and the lane moves again.
_PAUSE = 0.3
# The lane's lock is a row lock; whoever writes in a transaction now is the one who has it.
_DECIDER = "SELECT client_port FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND application_name = 'fairlane'"


def measure(contest: Contest) -> list[Result]:
    """Seconds from the signal to the lane's next commit, as latencies; their median and longest as facts."""
    with contest.site.only(["lanes", "sweep"]) as site:
        lines.create_items(site, [_SKU], 100_000_000)

        def kill() -> Sample:
            began = time.monotonic()
            gaps = [
                _kill_one(site, contest.scaled(_LINE, _LINE_QUICK))
                for _ in range(contest.scaled(_KILLS_PER_ROUND, _KILLS_QUICK))
            ]
            return Sample(len(gaps), time.monotonic() - began, curve_of(gaps))

        killed = Contender("kill -9", ours=True)
        samples = contest.run({killed: kill})
    gaps = [gap for sample in samples[killed] for gap in {sample.curve[point] for point in (0, 33, 67, 100)}]
    facts = {MEDIAN: median(gaps), LONGEST: max(gaps)}
    return [Result(NAME, "kill -9 of the deciding worker", "kills", samples, facts)]


def _kill_one(site: Site, line: int) -> float:
    lane = lane_of(_SKU, site.settings.lanes)
    queued = "SELECT count(*) FROM (SELECT FROM fairlane.purchases WHERE lane = %s AND status = 'queued' LIMIT %s) AS q"
    if site.number(queued, lane, line // 2) < line // 2:
        lines.queue_purchases(site, [_SKU], line)
        site.call([lane])
    through = lines.decided_through(site, lane)
    site.wait(lambda: lines.decided_through(site, lane) > through, "a decision")
    decider = _decider(site)
    killed = time.monotonic()
    decider.kill()
    # What it had committed until then may be seen only now.
    before = lines.decided_through(site, lane)
    site.wait(lambda: lines.decided_through(site, lane) > before, "a decision after the kill", look_every=0.002)
    gap = time.monotonic() - killed
    time.sleep(_PAUSE)
    return gap


def _decider(site: Site) -> psutil.Process:
    """The worker process whose transaction is open. Raises SiteError when none is caught in the act."""
    deadline = time.monotonic() + 10
    children = psutil.Process(site.pids["lanes"]).children(recursive=True)
    by_port = {
        connection.laddr.port: child
        for child in children
        for connection in child.net_connections(kind="tcp")
        if connection.status == psutil.CONN_ESTABLISHED
    }
    while time.monotonic() < deadline:
        for (port,) in site.connection.execute(_DECIDER.encode()).fetchall():
            if port in by_port:
                return by_port[port]
    raise SiteError("nobody was seen deciding")
