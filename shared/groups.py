"""Grouping: while one batch is under way, or a pause lasts, the next one collects. An idle system waits for nothing.

The same small engine carries admission, acceptance, status reads and outcomes: many callers each bring one thing, a
single function handles them by the batch, and each caller gets its own answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from shared.errors import QueueFullError
from shared.logs import nobodys_context
from shared.rhythm import Rhythm

Thing = TypeVar("Thing")
Answer = TypeVar("Answer")


class Group(Generic[Thing, Answer]):
    """Brings things to `handle` in batches of at most `batch`, one batch after another, in the order of arrival.

    `handle` returns one answer per thing, in order; an answer that is an exception is raised at its caller. If
    `handle` itself raises, every caller of that batch gets that exception. A caller that is cancelled cancels
    nothing: its thing is handled all the same, since others may already depend on it (a commit under way does).

    `every` is the least number of seconds between the beginnings of two batches. One that is full already does not
    wait.
    """

    def __init__(
        self,
        handle: Callable[[Sequence[Thing]], Awaitable[Sequence[Answer | Exception]]],
        *,
        batch: int,
        bound: int | None = None,
        every: float = 0.0,
    ) -> None:
        self._handle = handle
        self._batch = batch
        self._rhythm = Rhythm(every)
        self._bound = bound
        self._waiting: deque[tuple[Thing, asyncio.Future[Answer]]] = deque()
        self._runner: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many things wait for the next batch."""
        return len(self._waiting)

    async def bring(self, thing: Thing) -> Answer:
        """The answer to this one thing. Raises QueueFullError, having brought nothing, when too many wait."""
        if self._bound is not None and len(self._waiting) >= self._bound:
            raise QueueFullError
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((thing, answer))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run(), context=nobodys_context())
        # A caller that is cancelled cancels its own answer and nothing else.
        return await answer

    async def drain(self) -> None:
        """Wait until everything brought so far was handled."""
        while self._runner is not None:
            await asyncio.shield(self._runner)

    async def _run(self) -> None:
        try:
            # One turn of the loop first: whoever is ready in the same turn joins the batch.
            await asyncio.sleep(0)
            while self._waiting:
                if len(self._waiting) < self._batch:
                    await self._rhythm.beat()
                taken = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
                await self._run_batch(taken)
        finally:
            self._runner = None

    async def _run_batch(self, taken: Sequence[tuple[Thing, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._handle([thing for thing, _ in taken])
        except Exception as error:  # noqa: BLE001 - raised again, at each caller
            for _, future in taken:
                _fail(future, error)
            return
        except asyncio.CancelledError:
            for _, future in taken:
                future.cancel()
            raise
        for (_, future), answer in zip(taken, answers, strict=True):
            if isinstance(answer, Exception):
                _fail(future, answer)
            elif not future.done():
                future.set_result(answer)


def _fail(future: asyncio.Future[Answer], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        # The caller may be gone; then nobody fetches this, which asyncio would report as a defect.
        future.exception()
