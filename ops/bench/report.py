"""What a run says: a table per scenario, the figures, and all of it as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ops.bench.figures import Figure
from ops.bench.samples import Contender, Result

_MIB = 1024 * 1024


def machine() -> str:
    """What the figures were measured on, in a few words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores ({platform.machine()}), Python {platform.python_version()}"


def print_result(result: Result, console: Console) -> None:
    """One scenario as a table: rates, latencies, ratios, processor time and memory by process."""
    table = Table(title=result.title, title_justify="left", caption=_facts(result), caption_justify="left")
    table.add_column("")
    ours = [contender for contender in result.samples if contender.ours]
    for heading in (f"{result.unit} / s", "p50", "p99"):
        table.add_column(heading, justify="right")
    for each in ours:
        table.add_column(f"{each.name} is" if len(ours) > 1 else "ours is", justify="right")
    table.add_column("processor seconds per 1,000")
    table.add_column("most memory, MiB")
    for contender in result.samples:
        table.add_row(*_row(result, contender, ours))
    console.print(table)


def _row(result: Result, contender: Contender, ours: Sequence[Contender]) -> list[str]:
    name = contender.name
    cpu = {process: spent for process, spent in result.cpu_per_1000(name).items() if spent >= 0.0005}
    memory = {process: used for process, used in result.memory(name).items() if process in cpu}
    total = f"{sum(cpu.values()):.2f}: " if len(cpu) > 1 else ""
    return [
        f"{name} (limit)" if contender.limit else name,
        f"{result.rate(name):,.0f}",
        duration(result.latency(name, 50)),
        duration(result.latency(name, 99)),
        *("" if each is contender else f"{result.ratio(each.name, name):.3g}×" for each in ours),
        total + ", ".join(f"{process} {spent:.2f}" for process, spent in cpu.items()),
        ", ".join(f"{process} {used / _MIB:.0f}" for process, used in memory.items()),
    ]


def print_figures(figures: Sequence[Figure], console: Console) -> None:
    """The figures to reach, and whether they were."""
    table = Table(title=f"Figures, on {machine()}", title_justify="left")
    for heading in ("", "wanted", "seen", ""):
        table.add_column(heading)
    for figure in figures:
        table.add_row(figure.what, figure.wanted, figure.seen, "yes" if figure.met else "[bold red]no[/bold red]")
    console.print(table)


def as_json(results: Sequence[Result], figures: Sequence[Figure], *, rounds: int, quick: bool) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "machine": machine(),
        "rounds": rounds,
        "quick": quick,
        "figures": [{"what": each.what, "wanted": each.wanted, "seen": each.seen, "met": each.met} for each in figures],
        "scenarios": [result.as_json() for result in results],
    }


def duration(seconds: float | None) -> str:
    """For people: milliseconds below a second."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _facts(result: Result) -> str | None:
    facts: Mapping[str, float] = result.facts
    return ", ".join(f"{name}: {value:.4g}" for name, value in facts.items()) or None
