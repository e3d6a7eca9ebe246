"""A rhythm makes whoever comes too soon wait for the rest, and nobody else. The clock is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from shared.groups import Group
from shared.rhythm import Rhythm


class Clock:
    """Time that passes when somebody sleeps, or is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        self.slept: list[float] = []
        monkeypatch.setattr("shared.rhythm.monotonic", lambda: self.now)
        monkeypatch.setattr("shared.rhythm.sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def test_who_comes_first_and_who_comes_late_wait_for_nothing(clock: Clock) -> None:
    beats = Rhythm(0.5)
    await beats.beat()
    clock.now += 0.5
    await beats.beat()
    clock.now += 60
    await beats.beat()
    assert clock.slept == []


async def test_who_comes_too_soon_waits_for_the_rest(clock: Clock) -> None:
    beats = Rhythm(0.5)
    await beats.beat()
    clock.now += 0.2
    await beats.beat()
    assert clock.slept == [0.3]


async def test_those_who_come_at_once_take_turns(clock: Clock) -> None:
    beats = Rhythm(0.5)
    began = clock.now
    await asyncio.gather(*(beats.beat() for _ in range(3)))
    assert len(clock.slept) == 2
    await beats.beat()
    assert clock.now >= began + 1.5


async def test_a_group_with_a_rhythm_collects_between_its_batches_unless_one_is_full(clock: Clock) -> None:
    batches: list[list[int]] = []

    async def handle(things: Sequence[int]) -> list[int | Exception]:
        batches.append(list(things))
        return list(things)

    group: Group[int, int] = Group(handle, batch=3, every=0.5)
    assert await group.bring(1) == 1
    assert clock.slept == []
    assert await asyncio.gather(*map(group.bring, range(3))) == [0, 1, 2]
    assert clock.slept == []
    assert await group.bring(1) == 1
    assert clock.slept == [0.5]
    assert batches == [[1], [0, 1, 2], [1]]
