"""The live view: short grouped counts from Postgres a few times a second, and what the crowd itself saw."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from ops.demo.buying import Tally
from shared.states import Status

_COUNTS = text("SELECT lane, status, count(*) AS purchases FROM fairlane.purchases GROUP BY lane, status")

#: Plain output: a line a second tells the story and fills no log.
_LINE_EVERY = 1.0
_BAR = 24

_HELD = (Status.RESERVED, Status.CHARGING, Status.IN_DOUBT, Status.NEEDS_REVIEW)
_REFUSED = (Status.SOLD_OUT, Status.LIMIT_REACHED, Status.CANCELLED, Status.EXPIRED)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The sale at one moment: purchases per state, those without a decision per lane, and what the crowd did."""

    seconds: float
    states: Counter[str]
    waiting: dict[int, int]
    tally: Tally
    buyers: int

    @property
    def undecided(self) -> int:
        """Purchases whose turn has not come."""
        return self.states[Status.QUEUED]

    @property
    def decided(self) -> int:
        """Purchases whose turn has come and that wait for nobody else's payment."""
        return self.states.total() - self.undecided - self.states[Status.WAITLISTED]

    @property
    def held(self) -> int:
        """Purchases with stock that are not paid yet."""
        return sum(self.states[status] for status in _HELD)

    @property
    def refused(self) -> int:
        """Refused at the door or by a decision."""
        return self.tally.refused + sum(self.states[status] for status in _REFUSED)

    @property
    def settled(self) -> int:
        """Purchases that will not change any more."""
        ended = (Status.CONFIRMED, Status.DECLINED, *_REFUSED)
        return sum(self.states[status] for status in ended)


async def take_snapshot(engine: AsyncEngine, tally: Tally, buyers: int, seconds: float) -> Snapshot:
    """Count what is there now: one statement, one short transaction."""
    async with engine.begin() as connection:
        rows = (await connection.execute(_COUNTS)).mappings().all()
    states: Counter[str] = Counter()
    waiting: dict[int, int] = {}
    for row in rows:
        states[row["status"]] += row["purchases"]
        if row["status"] in (Status.QUEUED, Status.WAITLISTED):
            waiting[row["lane"]] = waiting.get(row["lane"], 0) + row["purchases"]
    return Snapshot(seconds, states, waiting, tally, buyers)


class View(Protocol):
    """Shows one snapshot after another."""

    def show(self, snapshot: Snapshot) -> None:
        """Show this one in place of the last."""


@contextmanager
def open_view(console: Console, *, plain: bool, lanes: int) -> Iterator[View]:
    """A view for this console: redrawn in place, or a line a second."""
    if plain:
        yield PlainView(console)
        return
    with Live(console=console, refresh_per_second=8, transient=False) as live:
        yield LiveView(live, lanes)


class PlainView:
    """A line a second below a line of headings, for logs and pipes: some 95 columns wide."""

    _HEADINGS = ("seconds", "arrived", "waiting", "waitlist", "decided", "reserved", " paid", "declined", "refused")

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0.0
        self._console.print("  ".join([*self._HEADINGS, "busiest lanes"]))

    def show(self, snapshot: Snapshot) -> None:
        """See `View`."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LINE_EVERY
        s = snapshot
        numbers = (
            f"{s.seconds:.1f}",
            s.tally.arrived,
            s.undecided,
            s.states[Status.WAITLISTED],
            s.decided,
            s.held,
            s.states[Status.CONFIRMED],
            s.states[Status.DECLINED],
            s.refused,
        )
        cells = [str(number).rjust(len(name)) for name, number in zip(self._HEADINGS, numbers, strict=True)]
        self._console.print("  ".join([*cells, _busiest_lanes(s)]))


class LiveView:
    """The same, redrawn in place, with a bar per lane."""

    def __init__(self, live: Live, lanes: int) -> None:
        self._live = live
        self._lanes = lanes
        self._most = 1

    def show(self, snapshot: Snapshot) -> None:
        """See `View`."""
        self._most = max(self._most, *snapshot.waiting.values(), 1)
        self._live.update(Panel(Group(self._numbers(snapshot), Text(), self._bars(snapshot)), title="The sale"))

    def _numbers(self, snapshot: Snapshot) -> RenderableType:
        s = snapshot
        table = Table.grid(padding=(0, 3), expand=False)
        for _ in range(4):
            table.add_column(justify="left", no_wrap=True)
        rate = s.settled / s.seconds if s.seconds > 0 else 0.0
        cells = [
            ("arrived", f"{s.tally.arrived} of {s.buyers}", "white"),
            ("waiting", str(s.undecided), "yellow"),
            ("waitlist", str(s.states[Status.WAITLISTED]), "yellow"),
            ("decided", str(s.decided), "white"),
            ("reserved, unpaid", str(s.held), "cyan"),
            ("paid", str(s.states[Status.CONFIRMED]), "green"),
            ("declined", str(s.states[Status.DECLINED]), "red"),
            ("refused", str(s.refused), "magenta"),
            ("settled per second", f"{rate:.0f}", "white"),
            ("seconds", f"{s.seconds:.1f}", "white"),
            ("requests", str(s.tally.requests), "white"),
            ("repeated keys", str(s.tally.replayed), "white"),
        ]
        for first in range(0, len(cells), 4):
            table.add_row(
                *(Text.assemble(f"{name} ", (value, f"bold {c}")) for name, value, c in cells[first : first + 4])
            )
        return table

    def _bars(self, snapshot: Snapshot) -> RenderableType:
        bars = []
        for lane in range(self._lanes):
            waiting = snapshot.waiting.get(lane, 0)
            length = -(-waiting * _BAR // self._most)
            style = "yellow" if waiting else "bright_black"
            bars.append(Text.assemble(f"lane {lane:02d} ", ("█" * length or "·", style), f" {waiting or ''}"))
        return Columns(bars, width=_BAR + 16, column_first=True)


def _busiest_lanes(snapshot: Snapshot) -> str:
    """The two lanes where most is waiting; all of them would not fit into a line."""
    busiest = sorted(snapshot.waiting.items(), key=lambda lane: -lane[1])[:2]
    return " ".join(f"{lane:02d}:{count}" for lane, count in busiest) or "-"
