"""Processor time and memory of processes, by the name they go by in the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

#: Gives the processes that are behind a name now, children included.
Processes = Callable[[], list[psutil.Process]]


@dataclass(frozen=True, slots=True)
class Used:
    """What was used in a span of time: processor seconds and the most bytes of memory, by name."""

    cpu: Mapping[str, float]
    memory: Mapping[str, int]


class Usage:
    """Counts from its making until `read`. What has ended in between counts too, if its parent lives."""

    def __init__(self, named: Mapping[str, Processes]) -> None:
        self._named = named
        self._before = {name: _cpu(processes()) for name, processes in named.items()}

    def read(self) -> Used:
        """What was used since."""
        cpu, memory = {}, {}
        for name, processes in self._named.items():
            now = processes()
            cpu[name] = _cpu(now) - self._before[name]
            memory[name] = sum(map(_own_memory, now))
        return Used(cpu, memory)


def family(pid: int | None) -> list[psutil.Process]:
    """A process and all that came from it and live; none if there is no such process."""
    if pid is None:
        return []
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu(processes: list[psutil.Process]) -> float:
    """Processor seconds of these and of those that they have waited for, such as backends of Postgres."""
    spent = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent += times.user + times.system + times.children_user + times.children_system
    return spent


def _own_memory(process: psutil.Process) -> int:
    """Bytes that would be free if the process ended: what it shares with others is not counted for each."""
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0
