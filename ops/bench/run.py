"""The benchmark from beginning to end."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from ops.bench import lines, picture
from ops.bench.buyers import PROCESSES, be_ready
from ops.bench.contest import Contest
from ops.bench.figures import figures
from ops.bench.report import as_json, machine, print_figures, print_result
from ops.bench.samples import Result
from ops.bench.scenarios import (
    backlog,
    charges,
    checkout,
    crowd,
    door,
    hot_item,
    idle,
    killed,
    latency,
    many_items,
    neighbours,
)
from ops.bench.site import Site
from ops.interruption import orderly_end

ROUNDS: Final = 5
"""Rounds of a whole run; a quick one has one."""

SCENARIOS: Final[dict[str, Callable[[Contest], list[Result]]]] = {
    # First: autovacuum has nothing to do yet.
    "idle": idle.measure,
    "hot-item": hot_item.measure,
    "many-items": many_items.measure,
    "checkout": checkout.measure,
    "door": door.measure,
    "crowd": crowd.measure,
    "latency": latency.measure,
    "neighbours": neighbours.measure,
    "charges": charges.measure,
    "backlog": backlog.measure,
    "killed": killed.measure,
}
"""What `--only` chooses from, in the order in which they run."""

_LINES: Final = ("web", "lanes", "charges", "sweep")
#: Seconds a payment takes: a quick card payment.
_PAYMENT: Final = 0.05

#: A table is as wide as it must be: output is often piped into a file, which has no width.
_WIDTH: Final = 200


def run_bench(*, only: Sequence[str], rounds: int | None, quick: bool, to_json: bool, picture_file: Path | None) -> int:
    """Run the scenarios; returns 0, or 130 after Ctrl-C and 143 after SIGTERM.

    The tables go to standard output, or everything as JSON with `to_json`; progress goes to standard error. A figure
    that is not reached is no failure: it is a measurement.
    """
    rounds = rounds or (1 if quick else ROUNDS)
    watching, console = Console(stderr=True, highlight=False, soft_wrap=True), Console(highlight=False, width=_WIDTH)
    began = time.monotonic()
    results: list[Result] = []
    with orderly_end() as interruption:
        try:
            with _pool_and_site() as (pool, site):
                for name in only or SCENARIOS:
                    say = _progress(watching, name, began)
                    say("starts")
                    found = SCENARIOS[name](Contest(pool, site, rounds, quick, say))
                    results += found
                    if not to_json:
                        for result in found:
                            print_result(result, console)
        except KeyboardInterrupt:
            watching.print("Stopped; nothing is left running.")
            return interruption.code
    reached = figures(results)
    if to_json:
        said = as_json(results, reached, rounds=rounds, quick=quick)
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(said)).decode() + "\n")
    else:
        print_figures(reached, console)
    if picture_file is not None and picture.draw(results, picture_file):
        watching.print(f"The picture is in {picture_file}.")
    watching.print(f"{rounds} round{'s' * (rounds > 1)} on {machine()}, {time.monotonic() - began:.0f} s in all.")
    return 0


@contextmanager
def _site() -> Iterator[Site]:
    """Everything up and warm: connections open, statements prepared."""
    with Site(_LINES, latency=_PAYMENT) as site:
        lines.warm_up(site)
        lines.wait_until_settled(site)
        yield site


@contextmanager
def _pool_and_site() -> Iterator[tuple[ProcessPoolExecutor, Site]]:
    """Processes for buyers and load, new ones, as what this process has open must not be shared; and a site."""
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        # Their imports belong to no measurement, but may take place beside the start of everything else.
        starting = [pool.submit(be_ready) for _ in range(PROCESSES)]
        with _site() as site:
            for ready in starting:
                ready.result()
            yield pool, site


def _progress(console: Console, scenario: str, began: float) -> Callable[[str], None]:
    def say(what: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:4.0f} s[/dim]  {scenario}: {what}", markup=True)

    return say
