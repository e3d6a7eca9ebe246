"""The door only: how many requests a second are accepted, refused and told how they stand, beside a bare 202."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from ops.bench import bare, lines, traffic
from ops.bench.contest import Contest
from ops.bench.samples import Contender, Result, Sample, curve_of
from ops.bench.site import SiteError, wait_for
from ops.bench.usage import Usage, family
from ops.embedded.ports import LOOPBACK, free_port

NAME = "door"
ACCEPT = Contender("accepted: a durable 202", ours=True)
REFUSE = Contender("refused: sold out", ours=True)
POLL = Contender("a poll of a queued purchase", ours=True)
BARE = Contender("a bare 202", limit=True)

_SECONDS, _SECONDS_QUICK = 1.8, 0.5
#: No figure is made of the polls.
_POLL_SECONDS = 0.8
#: All in use, all the time: a small crowd.
_CONNECTIONS = 512


def measure(contest: Contest) -> list[Result]:
    """Requests answered per second, 512 at a time. Nobody decides meanwhile."""
    with contest.site.only(["web"]) as site, bare_server() as (bare_url, bare_pid):
        lines.create_items(site, ["hot"], 100_000_000)
        lines.create_items(site, ["gone"], 0)
        target = traffic.Target(site.url, site.api_key, connections=_CONNECTIONS)
        lines.queue_purchases(site, ["hot"], 1)
        row = site.connection.execute("SELECT id FROM fairlane.purchases LIMIT 1").fetchone()
        if row is None:
            raise SiteError("no purchase was queued")
        seconds = _SECONDS_QUICK if contest.quick else _SECONDS

        def run(name: str, asked: traffic.Target, answer: int, seconds: float = seconds) -> Sample:
            usage = Usage({"bare": partial(family, bare_pid)}) if name == "bare" else site.usage()
            measured = contest.pool.submit(traffic.closed_loop, asked, seconds).result()
            used = usage.read()
            if set(measured.statuses) != {answer}:
                raise SiteError(f"answers that are not {answer}: {dict(measured.statuses)}")
            cpu, memory = {"load": measured.cpu, **used.cpu}, {"load": measured.memory, **used.memory}
            return Sample(measured.count, measured.seconds, curve_of(measured.latencies), cpu, memory)

        samples = contest.run(
            {
                BARE: lambda: run("bare", replace(target, url=bare_url), 202),
                ACCEPT: lambda: run("accept", target, 202),
                REFUSE: lambda: run("refuse", replace(target, sku="gone"), 409),
                POLL: lambda: run("poll", replace(target, path=f"/v1/purchases/{row[0].hex}"), 200, _POLL_SECONDS),
            }
        )
    return [Result(NAME, f"The door only, {_CONNECTIONS} connections", "requests answered", samples)]


@contextmanager
def bare_server() -> Iterator[tuple[str, int]]:
    """The bare 202: its URL and process id."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", bare.__name__, str(port)], stdin=subprocess.PIPE)
    url = f"http://{LOOPBACK}:{port}"
    try:
        wait_for(lambda: _answers(url), "the bare server did not come up")
        yield url, server.pid
    finally:
        server.kill()
        server.wait()
        if server.stdin is not None:
            server.stdin.close()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()  # noqa: S310  # our own address
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
