"""The picture of a run: rates side by side on a log scale, and how long buyers waited."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ops.bench.report import machine
from ops.bench.samples import Result
from ops.bench.scenarios import checkout, hot_item

_OURS, _PEER, _LIMIT = "#0b6e4f", "#8d99ae", "#d9d9d9"
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    # The same run gives the same file, byte for byte.
    "svg.hashsalt": "fairlane",
}


def draw(results: Iterable[Result], file: Path) -> bool:
    """Draw what was measured of one hot item into an SVG or PNG, by the file's ending.

    Returns False, and draws nothing, when neither of its scenarios was run.
    """
    by_name = {result.name: result for result in results}
    paid, free = by_name.get(checkout.NAME), by_name.get(hot_item.NAME)
    panels = [result for result in (paid, free) if result is not None]
    if not panels:
        return False
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 2.9 * len(panels) + 0.4), layout="constrained")
        rows = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(5, 4))
        for (rates, waits), result in zip(rows, panels, strict=True):
            _draw_rates(rates, result)
            _draw_waits(waits, result)
        figure.suptitle(f"One hot item; everything, buyers included, on {machine()}", fontsize=9, color="#555555")
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return True


def _draw_rates(axes: Axes, result: Result) -> None:
    contenders = sorted(result.samples, key=lambda contender: result.rate(contender.name))
    rates = [result.rate(contender.name) for contender in contenders]
    colours = [_OURS if each.ours else _LIMIT if each.limit else _PEER for each in contenders]
    names = [f"{each.name} (limit)" if each.limit else each.name for each in contenders]
    bars = axes.barh(names, rates, color=colours)
    axes.set_xscale("log")
    axes.set_xlim(min(rates) / 2, max(rates) * 3)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    axes.set_title(f"{result.title}: {result.unit} a second (log scale)", fontsize=10, loc="left")


def _draw_waits(axes: Axes, result: Result) -> None:
    for contender in result.samples:
        points = [each for point in range(101) if (each := result.latency(contender.name, point)) is not None]
        if not points:
            continue
        style: dict[str, Any] = {"color": _OURS, "linewidth": 2.5} if contender.ours else {"linewidth": 1.2}
        label = contender.name
        if contender.ours and result.name == checkout.NAME:
            label += f" ({checkout.PAUSES:g} s of it are its polls' pauses)"
        axes.plot(range(101), points, label=label, **style)
    axes.set_yscale("log")
    axes.set_xlabel("percent of buyers")
    axes.set_ylabel("seconds they waited, at most")
    if axes.lines:
        axes.legend(fontsize=7, frameon=False)
    axes.set_title("how long buyers waited", fontsize=10, loc="left")
