"""What one worker process owns: its connections, its decider, its charging loop. Made on first use, after any fork."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop
from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from shared.calling import Caller
from shared.database import make_async_engine, make_engine
from shared.garbage import spare_what_is_here
from shared.redis_clients import make_async_redis, make_redis
from shared.settings import Settings
from workers.charge import Charged, Charger
from workers.decide import Decider, Drained
from workers.gateways import Gateway, load_gateway
from workers.reconcile import Reconciled, Reconciler
from workers.record import Recorder

Answer = TypeVar("Answer")

#: How long a stopping process waits for its connections to close. All calls were recorded before.
_CLOSE_WITHIN = 5.0


class WorkerProcess:
    """The parts of one Celery worker process. A prefork child makes its own: nothing is shared across a fork.

    Lanes are decided in whatever thread runs the task, one at a time per process. Charges run on one event loop in a
    thread of its own, however many tasks wait for it.
    """

    def __init__(self, settings: Settings, celery: Celery) -> None:
        self._settings = settings
        self._celery = celery
        self._making = threading.Lock()
        self._engine: Engine | None = None
        self._decider: Decider | None = None
        self._charging: _Charging | None = None
        self._stopping = threading.Event()

    def decide(self, lane: int) -> Drained:
        """Drain this lane, see `Decider.drain`."""
        with self._making:
            if self._decider is None:
                self._engine = make_engine(self._settings)
                redis = make_redis(self._settings)
                self._decider = Decider(
                    self._engine, redis, Caller(self._settings, self._celery, redis), self._settings
                )
                spare_what_is_here()
        return self._decider.drain(lane, self._stopping.is_set)

    def charge(self) -> Charged:
        """Charge what is due, see `Charger.drain`."""
        charging = self._charging_parts()
        return charging.run(charging.charger.drain(self._stopping.is_set))

    def _charging_parts(self) -> _Charging:
        with self._making:
            if self._charging is None:
                self._charging = _Charging(self._settings, Caller(self._settings, self._celery))
                spare_what_is_here()
            return self._charging

    def reconcile(self) -> Reconciled:
        """Ask the provider about purchases in doubt, see `Reconciler.run_once`."""
        charging = self._charging_parts()
        return charging.run(charging.reconciler.run_once())

    def stop(self) -> None:
        """Ask what runs to give up at its next safe point: between batches, before the next claim."""
        self._stopping.set()

    def close(self) -> None:
        """Close every connection. Nothing may run any more."""
        if self._charging is not None:
            self._charging.close()
        if self._engine is not None:
            self._engine.dispose()


def gateway_of(settings: Settings) -> Gateway:
    """The gateway these settings name. Opens no connection. Raises SettingsError, naming the setting at fault."""
    return load_gateway(
        settings.gateway,
        url=settings.payment_url or "",
        call_timeout=settings.call_timeout,
        connections=settings.charge_slots,
    )


class _Charging:
    """An event loop in a thread, and the charger that lives on it."""

    def __init__(self, settings: Settings, caller: Caller) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="charging", daemon=True)
        self._thread.start()
        self._engine: AsyncEngine = make_async_engine(settings)
        self._redis = make_async_redis(settings)
        self.gateway: Gateway
        self.charger: Charger
        self.reconciler: Reconciler
        self.run(self._open(settings, caller))

    async def _open(self, settings: Settings, caller: Caller) -> None:
        # On the loop: the gateway and the charger belong to it.
        self.gateway = gateway_of(settings)
        worker = f"{socket.gethostname()}:{os.getpid()}"
        self.charger = Charger(self._engine, self._redis, self.gateway, caller, settings, worker)
        recorder = Recorder(self._engine, self._redis, caller, settings)
        self.reconciler = Reconciler(self._engine, self._redis, self.gateway, recorder, settings, worker)

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run this on the loop and wait for it, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        try:
            closing.result(_CLOSE_WITHIN)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_WITHIN)

    async def _close(self) -> None:
        await self.gateway.close()
        await self._redis.aclose()
        await self._engine.dispose()
