"""Processes of the service that run in this one, and that a test can crash or freeze at any named point.

Each is a thread with an event loop, connections and parts of its own, as a real process has them. A crash throws away
what it was doing and what it had in memory: an exception that nothing catches ends its work, everything else on its
loop is cancelled, its parts are made anew. A freeze stops the whole thread where it is, between two statements and
outside any transaction, until somebody wakes it: a process that was stopped and goes on later, believing what it
believed.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from psycopg.pq import TransactionStatus
from sqlalchemy.event import listen
from sqlalchemy.exc import DBAPIError

from producers.accept import Acceptor
from producers.cancel import Canceller
from shared.calling import Caller
from shared.database import is_passing, make_engine
from shared.redis_clients import make_redis
from shared.settings import Settings
from tests.integration.shopfloor import Shop, open_shop
from workers.charge import Charger
from workers.decide import Decider
from workers.gateways import Gateway
from workers.reconcile import Reconciler
from workers.sweep import Sweep

T = TypeVar("T")

#: Seconds in which a process must have ended, crashed or frozen on a loaded machine. It takes milliseconds.
BOUND = 60.0


class FaultKind(StrEnum):
    """What happens to a process at a point."""

    CRASH = "crash"  #: it dies
    FREEZE = "freeze"  #: it stops until it is woken


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a process, and where: when it passes `point` for the `skip` + first time."""

    kind: FaultKind
    point: str
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """The work is done."""

    result: Any


@dataclass(frozen=True, slots=True)
class Crashed:
    """The process died at this point, and a new one took its place."""

    point: str


@dataclass(frozen=True, slots=True)
class Frozen:
    """The process stopped at this point. Its work goes on when it is woken."""

    point: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Postgres refused for the moment: somebody kept a lock for too long on a busy machine. It may be done again."""

    error: BaseException


Report = Ended | Crashed | Frozen | Failed


class Crash(BaseException):
    """The process is gone."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a process has in memory. Each life has its own."""

    shop: Shop
    caller: Caller
    acceptor: Acceptor
    canceller: Canceller
    decider: Decider
    charger: Charger
    reconciler: Reconciler
    sweep: Sweep


Work = Callable[[Parts], Awaitable[Any]]

_acting: ContextVar[Process | None] = ContextVar("acting", default=None)


def passing(point: str) -> None:
    """The process that runs here passes this point. The action to arm the crash points with."""
    process = _acting.get()
    if process is not None:
        process.passes(point)


class AtOnce(Executor):
    """In place of a thread beside: this process freezes as a whole, and does one thing after the other."""

    def submit(self, work: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(work(*args, **named))
        return done


class Process:
    """One process. It does one work at a time; `start`, `wait`, `wake` and `close` are for the test's own thread."""

    def __init__(self, name: str, settings: Settings, gateway: Gateway) -> None:
        self.name = name
        self.frozen_at: str | None = None
        #: Seconds it takes its time after each statement, so that others come in between.
        self.slow = 0.0
        self._settings = settings
        self._gateway = gateway
        self._lives = 0
        self._fault: Fault | None = None
        self._passed = 0
        self._dead = False
        self._then: Callable[[Any], None] | None = None
        self._woken = threading.Event()
        #: Each with the number of the work it is about.
        self._reports: queue.SimpleQueue[tuple[int, Report]] = queue.SimpleQueue()
        self._works = 0
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: None)  # of tasks that died with their process
        self._executor = self._new_executor()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self._shop = self._run(self._stack.enter_async_context(open_shop(settings)))
        self._connections: list[Any] = []
        listen(self._shop.engine.sync_engine, "connect", lambda made, _: self._connections.append(made))
        self._engine = make_engine(settings)
        for engine in (self._engine, self._shop.engine.sync_engine):
            listen(engine, "after_cursor_execute", self._dawdle)
        self._redis = make_redis(settings)
        self.parts = self._run(self._born())

    def begin_again(self) -> None:
        """A new life, with nothing in memory. It must be idle."""
        self.parts = self._run(self._born())

    def start(self, work: Work, then: Callable[[Any], None], fault: Fault | None = None) -> None:
        """Begin this work; `then` gets its result in the test's thread, once it is done."""
        self._then = then
        self._works += 1
        self._arm(fault)
        asyncio.run_coroutine_threadsafe(self._live(work), self._loop)

    def wake(self, fault: Fault | None = None) -> None:
        """Let it go on from where it froze."""
        self.frozen_at = None
        self._arm(fault)
        self._woken.set()

    def wait(self) -> Report:
        """Until the work is done, or cannot go on. Raises what the work raised."""
        number, report = self._next_report()
        while number != self._works:  # of a work that was given up as stuck, and ended after all
            number, report = self._next_report()
        match report:
            case Ended(result):
                if self._then is not None:
                    self._then(result)
            case Frozen(point):
                self.frozen_at = point
            case Crashed():
                self._bury()
            case Failed(error):
                if not (isinstance(error, DBAPIError) and is_passing(error)):
                    raise error
        return report

    def passes(self, point: str) -> None:
        """It is at this point: crash or freeze if that is its fate."""
        if self._dead:
            raise Crash(point)
        fault = self._fault
        if fault is None or fault.point != point:
            return
        if fault.kind is FaultKind.FREEZE and self._in_a_transaction():
            return  # another task's: Postgres would end it, and this would be a crash
        self._passed += 1
        if self._passed <= fault.skip:
            return
        self._fault = None
        if fault.kind is FaultKind.CRASH:
            self._dead = True
            self._loop.call_soon_threadsafe(self._cancel_all)
            self._reports.put((self._works, Crashed(point)))
            raise Crash(point)
        self._reports.put((self._works, Frozen(point)))
        self._woken.wait()
        self._woken.clear()

    def close(self) -> None:
        """Close its connections and end its thread. It must be idle."""
        self._run(self._stack.aclose())
        self._redis.close()
        self._engine.dispose()
        self._executor.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(BOUND)
        self._loop.close()

    def _dawdle(self, *_: object) -> None:
        if self.slow:
            time.sleep(self.slow)

    def _in_a_transaction(self) -> bool:
        connections = (made.driver_connection for made in self._connections)
        return any(connection.pgconn.transaction_status != TransactionStatus.IDLE for connection in connections)

    def _next_report(self) -> tuple[int, Report]:
        try:
            return self._reports.get(timeout=BOUND)
        except queue.Empty:
            raise AssertionError(f"{self.name} neither ended, crashed nor froze") from None

    def _arm(self, fault: Fault | None) -> None:
        self._fault, self._passed = fault, 0

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(BOUND)

    async def _live(self, work: Work) -> None:
        _acting.set(self)
        number = self._works
        try:
            result = await work(self.parts)
        except (Crash, asyncio.CancelledError):
            return
        except Exception as error:  # noqa: BLE001 - raised again in the test's thread
            if not self._dead:
                self._reports.put((number, Failed(error)))
        else:
            if not self._dead:
                self._reports.put((number, Ended(result)))

    async def _born(self) -> Parts:
        self._lives += 1
        shop = self._shop
        caller = Caller(self._settings, shop.celery, shop.plain_redis)
        return Parts(
            shop,
            caller,
            Acceptor(shop.engine, shop.redis, caller, self._settings),
            Canceller(shop.engine, shop.redis, caller, self._settings),
            Decider(
                self._engine,
                self._redis,
                Caller(self._settings, shop.celery, self._redis),
                self._settings,
                teller=AtOnce(),
            ),
            shop.charger(self._gateway, worker=f"{self.name}.{self._lives}"),
            shop.reconciler(self._gateway),
            Sweep(shop.engine, shop.redis, caller, self._settings),
        )

    def _new_executor(self) -> ThreadPoolExecutor:
        executor = ThreadPoolExecutor(4, thread_name_prefix="publishing")
        self._loop.set_default_executor(executor)
        return executor

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _bury(self) -> None:
        self._run(self._end_everything())
        self._executor.shutdown()  # what runs in its threads is over, too
        self._executor = self._new_executor()
        self._dead = False
        while not self._reports.empty():
            self._reports.get()
        self.begin_again()

    async def _end_everything(self) -> None:
        # More than once: a drain that is cancelled waits for its calls, and these for their outcomes.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=0.1)
        # As the system does for a dead process: its sockets are closed, whatever was going on there.
        for connection in self._connections:
            connection.driver_connection.pgconn.finish()
        self._connections.clear()
        await self._shop.engine.dispose(close=False)
        await self._shop.redis.connection_pool.disconnect()
