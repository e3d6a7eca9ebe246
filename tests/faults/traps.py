"""Crash points of running processes, armed and sprung one at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil

from shared.crash_points import ACTIONS, POINTS

#: Seconds until a process comes by; some points are passed by the sweep only after a lock ran out.
SPRUNG_WITHIN = 30.0


def is_dead(pid: int) -> bool:
    """Whether this process is gone; one that only waits to be reaped is."""
    try:
        return bool(psutil.Process(pid).status() in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})
    except psutil.NoSuchProcess:
        return True


class Trap:
    """One crash point of one process that was started with `FAIRLANE_CRASH_AT=<folder>/`, or of one of its children.

    States: set, sprung (the process died there, or stands still there), let go.
    """

    def __init__(self, folder: Path, point: str, action: str) -> None:
        assert point in POINTS, point
        assert action in ACTIONS, action
        self.point = point
        self._folder = folder
        self._action = action
        for earlier in folder.glob(f"{point}*"):
            earlier.unlink()
        # Whole or not at all: somebody may pass just now.
        (folder / "next").write_text(action)
        (folder / "next").rename(folder / point)

    @property
    def pid(self) -> int | None:
        """Which process came by; None while nobody did."""
        for taken in self._folder.glob(f"{self.point}.*"):
            return int(taken.suffix.removeprefix("."))
        return None

    @property
    def sprung_at(self) -> float:
        """When it came by, as `time.time` tells it."""
        return (self._folder / f"{self.point}.{self.pid}").stat().st_ctime

    @property
    def sprung(self) -> bool:
        """Whether a process came by, and is dead or stands still."""
        if (pid := self.pid) is None:
            return False
        if self._action == "kill":
            return is_dead(pid)
        return not is_dead(pid) and bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)

    async def springs(self, within: float = SPRUNG_WITHIN, *, look_every: float = 0.02) -> int:
        """Wait until it is sprung; returns the id of the process."""
        deadline = time.monotonic() + within
        while not self.sprung:
            assert time.monotonic() < deadline, f"nobody was caught at {self.point} within {within:g} s"
            await asyncio.sleep(look_every)
        assert self.pid is not None
        return self.pid

    def take_back(self) -> None:
        """Nobody else is caught by it; who was already stays so."""
        (self._folder / self.point).unlink(missing_ok=True)

    def let_go(self) -> None:
        """The process that stands still goes on."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGCONT)
