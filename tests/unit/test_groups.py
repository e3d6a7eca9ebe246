"""Groups: while one batch is under way, the next one collects."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from structlog.contextvars import bound_contextvars, get_contextvars

from shared.errors import QueueFullError
from shared.groups import Group


class Door:
    """Handles batches only when told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.entered = asyncio.Event()

    async def handle(self, things: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(things))
        self.entered.set()
        await self.open.wait()
        return [ValueError(f"{thing} is odd") if thing % 2 else thing * 10 for thing in things]


async def test_what_comes_in_one_turn_goes_in_one_batch_in_order() -> None:
    door = Door()
    group = Group(door.handle, batch=10)
    assert await asyncio.gather(*(group.bring(n) for n in (2, 4, 6))) == [20, 40, 60]
    assert door.batches == [[2, 4, 6]]


async def test_the_next_batch_collects_while_one_is_under_way() -> None:
    door = Door()
    door.open.clear()
    group = Group(door.handle, batch=2)
    first = asyncio.create_task(group.bring(2))
    await door.entered.wait()
    later = [asyncio.create_task(group.bring(n)) for n in (4, 6, 8)]
    await asyncio.sleep(0)
    assert len(group) == 3
    door.open.set()
    assert await asyncio.gather(first, *later) == [20, 40, 60, 80]
    assert door.batches == [[2], [4, 6], [8]]


async def test_an_answer_that_is_an_error_is_its_callers_alone() -> None:
    group = Group(Door().handle, batch=10)
    answers = await asyncio.gather(*(group.bring(n) for n in (2, 3)), return_exceptions=True)
    assert answers[0] == 20
    assert isinstance(answers[1], ValueError)


async def test_a_batch_that_fails_fails_for_all_and_the_next_goes_on() -> None:
    calls = 0

    async def handle(things: Sequence[int]) -> list[int | Exception]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ConnectionError("gone")
        return list(things)

    group = Group(handle, batch=10)
    answers = await asyncio.gather(group.bring(1), group.bring(2), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ConnectionError, ConnectionError]
    assert await group.bring(3) == 3


async def test_too_many_are_turned_away_and_nothing_is_brought() -> None:
    door = Door()
    door.open.clear()
    group = Group(door.handle, batch=1, bound=1)
    first = asyncio.create_task(group.bring(2))
    await door.entered.wait()
    second = asyncio.create_task(group.bring(4))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await group.bring(6)
    door.open.set()
    assert [await first, await second] == [20, 40]
    assert door.batches == [[2], [4]]


async def test_a_caller_that_leaves_cancels_nothing() -> None:
    door = Door()
    door.open.clear()
    group = Group(door.handle, batch=10)
    leaving = asyncio.create_task(group.bring(2))
    staying = asyncio.create_task(group.bring(4))
    await door.entered.wait()
    leaving.cancel()
    door.open.set()
    assert await staying == 40
    assert door.batches == [[2, 4]]
    await group.drain()


async def test_a_batch_goes_by_the_id_of_nobody_who_brought_a_part_of_it() -> None:
    async def handle(things: Sequence[int]) -> list[dict[str, object] | Exception]:
        return [get_contextvars()] * len(things)

    with bound_contextvars(request_id="the first"):
        assert await Group(handle, batch=10).bring(1) == {}
