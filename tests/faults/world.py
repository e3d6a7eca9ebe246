"""A sale on this stage: what buyers, workers and admins do there, each with the service's own parts."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import psycopg
from psycopg.rows import dict_row
from redis import Redis, RedisError

from producers.accept import Acceptance, Accepted, KeyReused, Order
from producers.cancel import Cancellation, Cancelled, TooLate
from shared import doors, items
from shared.calling import lane_call
from shared.crash_points import armed
from shared.database import transaction
from shared.errors import StockBelowCommittedError, UnavailableError
from shared.items import ItemTerms
from shared.routing import CHARGE, CHARGES_QUEUE, DECIDE, RECONCILE, queue_of
from shared.settings import Settings
from shared.states import Status
from tests.faults.processes_that_fail import Parts, passing
from tests.faults.scripted_provider import Behaviour
from tests.faults.stage import Doing, Stage
from workers.reconcile import Reconciled

_EMPTY = """
DELETE FROM fairlane.charge_attempts; DELETE FROM fairlane.purchases; DELETE FROM fairlane.purchase_keys;
DELETE FROM fairlane.items;
UPDATE fairlane.lanes SET decided_through = 0 WHERE decided_through > 0;
"""


@dataclass(frozen=True, slots=True)
class Terms:
    """What an item of the sale is like. Prices do not matter here."""

    stock: int
    waitlist: bool = True
    per_customer: int | None = None
    hold_seconds: int = 900


@dataclass
class Asked:
    """One request, which its buyer repeats until it hears something. `purchase` once it was accepted."""

    order: Order
    purchase: str | None = None
    #: Whether the buyer was told that it is cancelled.
    cancelled: bool = False


@dataclass
class World(Stage):
    """One sale after another; `begin` starts one with nothing sold and nobody asking."""

    terms: dict[str, Terms] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    #: Items whose stock was changed since this was last emptied.
    changed: set[str] = field(default_factory=set)
    #: Charges that a recheck called unexpected, and that the script had not made twice.
    false_alarms: int = 0

    def begin(self, terms: dict[str, Terms]) -> None:
        """A new sale of these items."""
        self.wake_everybody()
        self.view.execute(_EMPTY)
        self.redis.flushall()
        self.provider.forget_everything()
        self.asked.clear()
        self.story.clear()
        self.terms = terms
        self.renew_processes()
        for sku, its in terms.items():
            self.run(self.put(sku, its))
        self.changed.clear()
        self.false_alarms = 0

    # What processes do

    def buy(self, *asked: Asked) -> Doing:
        """These buyers ask, again or for the first time, in this order."""
        orders = [msgspec.structs.replace(one.order, id=secrets.token_hex(16)) for one in asked]

        async def work(parts: Parts) -> list[Acceptance | BaseException]:
            accepting = (parts.acceptor.accept(order) for order in orders)
            answers = await asyncio.gather(*accepting, return_exceptions=True)
            await parts.acceptor.close()
            return answers

        def then(answers: list[Acceptance | BaseException]) -> None:
            for one, answer in zip(asked, answers, strict=True):
                if isinstance(answer, UnavailableError):
                    continue
                assert isinstance(answer, Accepted), f"{one.order.key}: {answer}"
                assert one.purchase in (None, answer.record.id), f"{one.order.key}: one key, two purchases"
                one.purchase = answer.record.id

        return Doing(f"buy {[(one.order.key, one.order.item, one.order.quantity) for one in asked]}", work, then)

    def buy_something_else(self, asked: Asked) -> Doing:
        """A buyer whose request was accepted uses its key for another one."""
        other = msgspec.structs.replace(asked.order, id=secrets.token_hex(16), quantity=asked.order.quantity + 1)

        async def work(parts: Parts) -> Acceptance:
            answer = await parts.acceptor.accept(other)
            await parts.acceptor.close()
            return answer

        def then(answer: Acceptance) -> None:
            assert isinstance(answer, KeyReused), f"{asked.order.key}: {answer}"

        return Doing(f"buy {asked.order.key} with another body", work, then)

    def cancel(self, asked: Asked) -> Doing:
        """A buyer whose request was accepted calls its purchase off, as `DELETE /v1/purchases/{id}` does."""

        async def work(parts: Parts) -> Cancellation | UnavailableError:
            assert asked.purchase is not None
            try:
                answer = await parts.canceller.cancel(asked.order.client, asked.purchase)
            except UnavailableError as error:
                return error
            await parts.canceller.close()
            return answer

        def then(answer: Cancellation | UnavailableError) -> None:
            match answer:
                case Cancelled():
                    asked.cancelled = True
                    self.noticed[f"cancelled while {answer.before or 'cancelled'}"] += 1
                case TooLate():
                    self.noticed["too late to cancel"] += 1
                case _:
                    assert isinstance(answer, UnavailableError), f"{asked.order.key}: {answer}"

        return Doing(f"cancel {asked.order.key}", work, then)

    def standing(self, status: Status) -> list[Asked]:
        """Those who know of a purchase of theirs that is in this state now."""
        rows = self.view.execute("SELECT id FROM fairlane.purchases WHERE status = %s", [status])
        there = {row["id"].hex for row in rows}
        return [asked for asked in self.asked if asked.purchase in there]

    def decide(self, sku: str, *, heard: bool = True) -> Doing:
        """Decide the lane of this item; `heard`: a claim check was taken for it, if there is one."""
        lane = self.lane(sku)
        if heard:
            self._take(queue_of(lane), DECIDE)

        async def work(parts: Parts) -> Any:
            return parts.decider.drain(lane)

        return Doing(f"decide {sku}", work)

    def charge(self, behaviours: Sequence[Behaviour] = (), *, heard: bool = True) -> Doing:
        """Charge what is due; the provider behaves like this."""
        if heard:
            self._take(CHARGES_QUEUE, CHARGE)

        async def work(parts: Parts) -> Any:
            return await parts.charger.drain()

        return Doing(f"charge {behaviours}", work, behaviours=tuple(behaviours))

    def reconcile(self, *, silent: bool = False, heard: bool = True) -> Doing:
        """Ask the provider about what is in doubt."""
        if heard:
            self._take(CHARGES_QUEUE, RECONCILE)

        async def work(parts: Parts) -> Any:
            return await parts.reconciler.run_once()

        def then(reconciled: Reconciled) -> None:
            if not self.provider.charged_twice:
                self.false_alarms += reconciled.found_late

        return Doing(f"reconcile, silent {silent}", work, then, silent=silent)

    def sweep(self) -> Doing:
        """One round of the sweep."""

        async def work(parts: Parts) -> Any:
            return await parts.sweep.run_once()

        return Doing("sweep", work)

    def restock(self, sku: str, change: int) -> Doing:
        """An admin makes the stock of an item so much larger or smaller."""
        (row,) = self.view.execute("SELECT stock FROM fairlane.items WHERE sku = %s", [sku])
        return self.put(sku, replace(self.terms[sku], stock=max(0, row["stock"] + change)))

    def leave(self, sku: str, units: int) -> Doing:
        """An admin takes away all of an item but what is held or sold, and so many units."""
        (row,) = self.view.execute("SELECT stock - available AS kept FROM fairlane.items WHERE sku = %s", [sku])
        return self.put(sku, replace(self.terms[sku], stock=row["kept"] + units))

    def put(self, sku: str, terms: Terms) -> Doing:
        """An admin creates or changes an item, as `PUT /v1/items/{sku}` does."""

        async def work(parts: Parts) -> bool:
            values = ItemTerms(
                name=sku,
                stock=terms.stock,
                price=500,
                currency="EUR",
                per_customer=terms.per_customer,
                hold_seconds=terms.hold_seconds,
                waitlist=terms.waitlist,
            )
            try:
                async with transaction(parts.shop.engine, self.settings) as connection:
                    saved = await items.save(connection, sku, values, self.settings)
            except StockBelowCommittedError:
                return False
            self.changed.add(sku)
            with suppress(RedisError):
                async with parts.shop.redis.pipeline(transaction=False) as pipe:
                    doors.queue_write(pipe, [saved.door], self.settings)
                    await pipe.execute()
            if not saved.created:
                await asyncio.to_thread(parts.caller.call, [lane_call(saved.lane)])
            return True

        return Doing(f"put {sku} {terms}", work)

    # Messages

    def messages(self) -> list[tuple[str, dict[str, Any]]]:
        """The tasks that wait in the queues, oldest first per queue, with their arguments."""
        queues = [*sorted({queue_of(self.lane(sku)) for sku in self.terms}), CHARGES_QUEUE]
        return [
            (message["headers"]["task"], json.loads(base64.b64decode(message["body"]))[1])
            for name in queues
            for message in map(json.loads, reversed(self.redis.lrange(name, 0, -1)))
        ]

    def deliver_everything(self, behaviours: Sequence[Behaviour] = ()) -> None:
        """Workers without a fault take every message there is, and those that come of it.

        The provider behaves like this at the first of the charges, and well after that.
        """
        skus = {self.lane(sku): sku for sku in self.terms}
        while messages := self.messages():
            for task, arguments in messages:
                match task:
                    case "purchases.decide":
                        self.run(self.decide(skus[arguments["lane"]]))
                    case "purchases.charge":
                        self.run(self.charge(behaviours))
                        behaviours = ()
                    case "purchases.reconcile":
                        self.run(self.reconcile())

    def _take(self, queue: str, task: str) -> None:
        for text in reversed(self.redis.lrange(queue, 0, -1)):
            if json.loads(text)["headers"]["task"] == task:
                self.redis.lrem(queue, -1, str(text))
                return


@contextmanager
def open_world(settings: Settings) -> Iterator[World]:
    """A world on these servers, everything closed at the end."""
    url = settings.database_url.replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        # Postgres itself does not crash here; without waiting for its disk three times as many sales fit into a run.
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET synchronous_commit = off".encode())
    with ExitStack() as stack:
        views = [stack.enter_context(psycopg.connect(url, autocommit=True, row_factory=dict_row)) for _ in range(2)]
        client = Redis.from_url(settings.redis_url, decode_responses=True)
        stack.callback(client.close)
        world = World(settings, views[0], views[1], client)
        stack.callback(world.close)
        stack.enter_context(armed(passing))
        yield world
