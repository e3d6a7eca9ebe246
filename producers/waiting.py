"""Waiting for a purchase to change: one subscription to Redis per API process, however many wait.

Whoever waits takes a bell first, reads then, and reads again each time the bell rings:

    with hub.bell(purchase_id) as bell:
        while not enough(reading := await reader.read(purchase_id)) and not bell.over:
            await bell.heard(until)

A bell rings when a newer status of its purchase was written, and by itself every second: a message can be lost, and
so can the connection to Redis, which comes back by itself. So a lost message costs a second, never an answer. Reading
after taking the bell leaves no moment at which a change is neither read nor heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Self

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from starlette.types import Receive

from producers.reading import Reader, Reading
from shared import keys
from shared.errors import UnavailableError
from shared.settings import Settings

log = structlog.get_logger()

#: Seconds after which a bell rings by itself. As often as a client without `Prefer: wait` asks.
LOOK_EVERY: Final = 1.0
#: Bells ring by themselves together with all others of the same tenth of a second: what they read is then one group.
_TOGETHER: Final = 0.1
#: Seconds of silence after which the subscription is tested. What is lost meanwhile costs those who wait a second each.
_TEST_AFTER: Final = 5.0
#: Seconds until a lost subscription is tried again. Those who wait look by themselves just as often.
_TRY_AGAIN: Final = 1.0


class Bell:
    """Rings for one who waits. `over`: there is nothing more to wait for, as the process ends or the client is gone."""

    __slots__ = ("_rung", "_sleeper", "over")

    def __init__(self) -> None:
        self._sleeper: asyncio.Future[None] | None = None
        self._rung = False
        self.over = False

    def ring(self) -> None:
        """Let the one who waits look again; remembered if nobody waits at this moment."""
        self._rung = True
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    def end(self) -> None:
        """Ring for the last time."""
        self.over = True
        self.ring()

    async def heard(self, until: float) -> None:
        """Return when it rings, after `LOOK_EVERY`, or at `until` (the event loop's time), whichever is first."""
        if not self._rung and not self.over:
            loop = asyncio.get_running_loop()
            look = (loop.time() + LOOK_EVERY) // _TOGETHER * _TOGETHER
            self._sleeper = loop.create_future()
            timer = loop.call_at(min(look, until), self.ring)
            try:
                await self._sleeper
            finally:
                timer.cancel()
                self._sleeper = None
        self._rung = False


class Hub:
    """Hears which purchases changed, and rings for those who wait. One per API process.

    Open it as a context: it subscribes in the background, also when Redis comes only later.
    """

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._answers_within = settings.redis_timeout
        self._bells: dict[str, set[Bell]] = {}
        self._ending = False
        self._listener: asyncio.Task[None] | None = None
        #: Set while this process hears what changed; for those who test.
        self.subscribed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._listener = asyncio.create_task(self._listen(), name="status-changes")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._bells.values()))

    @contextmanager
    def bell(self, purchase_id: str) -> Iterator[Bell]:
        """A bell for this purchase, as long as the block lasts."""
        bell = Bell()
        bell.over = self._ending
        self._bells.setdefault(purchase_id, set()).add(bell)
        try:
            yield bell
        finally:
            bells = self._bells[purchase_id]
            bells.remove(bell)
            if not bells:
                del self._bells[purchase_id]

    def release(self) -> None:
        """The process ends: let everybody who waits, now or later, answer at once with what is known."""
        self._ending = True
        for bells in self._bells.values():
            for bell in bells:
                bell.end()

    async def _listen(self) -> None:
        told = False
        # A cancellation may be lost, see `NarrowLock.renewing`.
        while not self._ending:
            try:
                async with self._redis.pubsub() as subscription:
                    await subscription.subscribe(keys.CHANGED)
                    await self._hear(subscription)
            except Exception as error:  # noqa: BLE001  # whatever it was: who waits looks by itself, and we try again
                # Once per outage.
                if self.subscribed.is_set() or not told:
                    log.warning("status_changes_not_heard", error=str(error))
                told = True
            finally:
                self.subscribed.clear()
            await asyncio.sleep(_TRY_AGAIN)

    async def _hear(self, subscription: PubSub) -> None:
        """Ring until the connection fails. Raises what the connection raises."""
        # Redis confirms the subscription, so there is something to be answered at first too.
        asked = True
        while not self._ending:
            message = await subscription.get_message(timeout=self._answers_within if asked else _TEST_AFTER)
            if message is None:
                if asked:
                    raise ConnectionError("the subscription is not answered")
                await subscription.ping()
                asked = True
                continue
            asked = False
            if not self.subscribed.is_set():
                # From now on every change is heard. Those of the time before may have been missed.
                self.subscribed.set()
                self._ring_all()
            if message["type"] == "message":
                self._ring(message["data"])

    def _ring(self, purchase_ids: str) -> None:
        if self._bells:
            for purchase_id in purchase_ids.split(" "):
                for bell in self._bells.get(purchase_id, ()):
                    bell.ring()

    def _ring_all(self) -> None:
        for bells in self._bells.values():
            for bell in bells:
                bell.ring()


@contextmanager
def until_gone(receive: Receive, bell: Bell) -> Iterator[None]:
    """Meanwhile, the bell is ended when the client hangs up. The body of the request was read, or is of no interest."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        bell.end()

    watcher = asyncio.create_task(watch(), name="client-gone")
    try:
        yield
    finally:
        watcher.cancel()


async def for_change(hub: Hub, reader: Reader, first: Reading, seconds: float, receive: Receive) -> Reading:
    """The purchase once its revision is another than that of `first`; as it is after so many seconds at the latest.

    Returns earlier with what is known when the process ends or the client hangs up. A read that fails is repeated; if
    the last one fails too, raises UnavailableError.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    latest = first
    failure: UnavailableError | None
    with hub.bell(first.record.id) as bell, until_gone(receive, bell):
        while True:
            try:
                latest = await reader.read(first.record.id, at_least=first.record.rev) or latest
                failure = None
            except UnavailableError as error:
                failure = error
            if latest.record.rev != first.record.rev or bell.over or loop.time() >= until:
                break
            await bell.heard(until)
    if failure is not None and not bell.over:
        raise failure
    return latest
