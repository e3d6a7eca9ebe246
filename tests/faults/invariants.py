"""What must hold at every moment of a sale, whatever failed, read over a connection of its own.

`History` remembers what was seen before: what is final, who came first, what Redis said. `check` compares everything
that is committed now with that and with the provider's ledger, and raises AssertionError with what is wrong.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

from shared import keys
from shared.routing import queue_of
from shared.states import FINAL, HOLDING, TRANSITIONS, WAITING, Status
from tests.faults.world import World

Row = dict[str, Any]

#: Given no stock.
_REFUSED = frozenset({Status.SOLD_OUT, Status.LIMIT_REACHED})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is committed and everything Redis says, between two steps."""

    purchases: dict[str, Row]
    items: dict[str, Row]
    attempts: dict[str, list[Row]]
    lanes: dict[int, int]
    statuses: dict[str, tuple[int, dict[str, Any]]]
    watermarks: dict[int, int]
    doors: dict[str, Row]
    #: Lanes with a claim check in their queue, and lanes with a mark.
    heard: frozenset[int]
    marked: frozenset[int]
    #: The purchase that each key stands for.
    keys: dict[tuple[str, str], str]

    @classmethod
    def take(cls, world: World) -> Snapshot:
        """As it is now. Nobody may be at work."""
        purchases = {row["id"].hex: row for row in world.view.execute("SELECT * FROM fairlane.purchases ORDER BY seq")}
        found = world.view.execute("SELECT * FROM fairlane.items")
        items = {row["sku"]: row for row in found}
        attempts = defaultdict(list)
        for row in world.view.execute("SELECT * FROM fairlane.charge_attempts ORDER BY attempt"):
            attempts[row["purchase_id"].hex].append(row)
        used = sorted({row["lane"] for row in items.values()})
        lanes = {row["lane"]: row["decided_through"] for row in world.view.execute("SELECT * FROM fairlane.lanes")}
        with world.redis.pipeline(transaction=False) as pipe:
            pipe.mget([keys.purchase("none"), *map(keys.purchase, purchases)])
            pipe.mget([keys.decided(-1), *map(keys.decided, used)])
            for lane in used:
                pipe.llen(queue_of(lane))
                pipe.exists(keys.called(queue_of(lane)))
            for sku in items:
                pipe.hgetall(keys.item(sku))
            texts, watermarks, *rest = pipe.execute()
        return cls(
            purchases,
            items,
            dict(attempts),
            lanes,
            {name: _parsed(text) for name, text in zip(purchases, texts[1:], strict=True) if text},
            {lane: int(text) for lane, text in zip(used, watermarks[1:], strict=True) if text},
            {sku: door for sku, door in zip(items, rest[2 * len(used) :], strict=True) if door},
            frozenset(lane for lane, length in zip(used, rest[: 2 * len(used) : 2], strict=True) if length),
            frozenset(lane for lane, mark in zip(used, rest[1 : 2 * len(used) : 2], strict=True) if mark),
            {
                (row["client_id"], row["idempotency_key"]): row["purchase_id"].hex
                for row in world.view.execute("SELECT * FROM fairlane.purchase_keys")
            },
        )

    def of(self, sku: str, *statuses: Status) -> Iterator[Row]:
        """The purchases of an item in these states, in order."""
        return (row for row in self.purchases.values() if row["item"] == sku and row["status"] in statuses)

    def undecided(self, sku: str) -> bool:
        """Whether somebody of this item is there to be decided now."""
        item = self.items[sku]
        within_reach = item["available"] + item["unpaid"]
        head = next(self.of(sku, Status.WAITLISTED), None)
        return next(self.of(sku, Status.QUEUED), None) is not None or (
            head is not None
            and (head["quantity"] <= item["available"] or head["quantity"] > within_reach or not item["waitlist"])
        )

    def forgotten(self) -> set[int]:
        """Lanes of which nobody will hear before a mark expires or the sweep comes."""
        busy = {item["lane"] for sku, item in self.items.items() if self.undecided(sku)}
        return (busy | self.marked) - self.heard


@dataclass
class History:
    """What was seen so far in one sale."""

    world: World
    before: Snapshot | None = None
    step: int = 0
    #: The step in which each purchase was first seen, and in which it was given or refused stock.
    seen: dict[str, int] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    final: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def check(self) -> Snapshot:
        """Assert that everything holds that must, and remember it."""
        self.step += 1
        world = self.world
        assert not world.provider.violations, world.provider.violations
        now = Snapshot.take(world)
        self.changed |= dict.fromkeys(world.changed, self.step)
        self._moves(now)
        self._stock(now)
        self._keys(now)
        self._charges(now)
        self._order(now)
        self._redis(now)
        self._calls(now)
        world.disturbed = False
        world.changed.clear()
        self.before = now
        return now

    def _moves(self, now: Snapshot) -> None:
        """Nothing is forgotten, nothing moves backwards, and only along the table of transitions."""
        before = self.before.purchases if self.before else {}
        assert before.keys() <= now.purchases.keys(), "a purchase is gone"
        for name, row in now.purchases.items():
            status = Status(row["status"])
            self.world.noticed.update([f"{status}"] if name not in before or before[name]["status"] != status else [])
            was = before.get(name)
            if was is not None:
                assert status in reachable(Status(was["status"])), f"{name}: from {was['status']} to {status}"
                assert row["rev"] >= was["rev"], f"{name}: its revision went back"
                assert row["rev"] > was["rev"] or status == was["status"], f"{name}: moved without a new revision"
                assert (row["fence"] or 0) >= (was["fence"] or 0), f"{name}: its fence went back"
                for column in ("seq", "item", "quantity", "customer", "amount", "client_id", "idempotency_key"):
                    assert row[column] == was[column], f"{name}: its {column} changed"
            if name in self.final:
                assert (status, row["charge_id"]) == self.final[name], f"{name}: was final and is {status}"
            elif status in FINAL:
                self.final[name] = (status, row["charge_id"])
            self.seen.setdefault(name, self.step)
            if row["decided_at"] is not None:
                (self.refused if status in _REFUSED else self.given).setdefault(name, self.step)

    def _stock(self, now: Snapshot) -> None:
        """Stock is what is available, held and sold, as the purchases say; nobody has more than one may."""
        for sku, item in now.items.items():
            held = sum(row["quantity"] for row in now.of(sku, *(HOLDING - {Status.CONFIRMED})) if row["decided_at"])
            sold = sum(row["quantity"] for row in now.of(sku, Status.CONFIRMED))
            if self.before and sku not in self.world.changed:
                assert item["stock"] == self.before.items[sku]["stock"], f"{sku}: its stock changed by itself"
            assert item["unpaid"] == held, f"{sku}: {item['unpaid']} unpaid, its purchases hold {held}"
            assert item["available"] == item["stock"] - held - sold, f"{sku}: available {item['available']} is wrong"
            assert item["available"] >= 0, f"{sku}: oversold"
            if item["per_customer"] is not None:
                has: Counter[str] = Counter()
                for row in now.of(sku, *HOLDING):
                    has[row["customer"]] += row["quantity"]
                assert all(n <= item["per_customer"] for n in has.values()), f"{sku}: over the limit: {has}"

    def _keys(self, now: Snapshot) -> None:
        """One key, one purchase, and nobody who was accepted is forgotten."""
        rows = [row["idempotency_key"] for row in now.purchases.values()]
        assert len(rows) == len(set(rows)), "a key has two purchases"
        owned = {(row["client_id"], row["idempotency_key"]): name for name, row in now.purchases.items()}
        assert now.keys == owned, "a purchase and its key do not know each other"
        owners = {row["idempotency_key"]: name for name, row in now.purchases.items()}
        for asked in self.world.asked:
            if asked.purchase is not None:
                assert owners.get(asked.order.key) == asked.purchase, f"{asked.order.key}: another purchase, or none"
            if asked.cancelled:
                status = now.purchases[owners[asked.order.key]]["status"]
                assert status == Status.CANCELLED, f"{asked.order.key}: was told it is cancelled, and is {status}"
        assert owners.keys() <= {asked.order.key for asked in self.world.asked}, "a purchase nobody asked for"

    def _charges(self, now: Snapshot) -> None:
        """Confirmed is who is charged, once; nobody is charged again while nobody knows of the first time."""
        provider = self.world.provider
        assert not self.world.false_alarms, "a charge was called unexpected that is the purchase's own"
        for name, row in now.purchases.items():
            status, executed = Status(row["status"]), provider.executed(name)
            by_script = name in provider.charged_twice
            assert len(executed) <= 1 or by_script, f"{name}: charged {len(executed)} times"
            if status is Status.CONFIRMED:
                assert row["charge_id"] in executed, f"{name}: confirmed without its charge"
            elif status not in (Status.CHARGING, Status.IN_DOUBT, Status.NEEDS_REVIEW):
                assert not provider.coming(name), f"{name}: {status} and charged"
            attempts = now.attempts.get(name, [])
            assert [a["attempt"] for a in attempts] == list(range(1, row["attempt"] + 1)), f"{name}: attempts lost"
            for attempt, following in pairwise(attempts):
                # A question that was asked late may find the charge of the next attempt: the provider's books have one
                # name for both. It is then written down for this one as well, and later than the next was made.
                known = attempt["outcome"] in ("not_sent", "not_charged") or (
                    attempt["outcome"] == "confirmed" and attempt["recorded_at"] > following["claimed_at"]
                )
                assert known, f"{name}: attempt {attempt['attempt']} is {attempt['outcome']} and there is another"
            if status is Status.DECLINED:
                never = sum(attempt["outcome"] == "not_charged" for attempt in attempts)
                given_up = never == self.world.settings.never_charged_limit
                assert given_up or provider.executed(name, "declined"), f"{name}: declined by nobody"
            if status is Status.NEEDS_REVIEW:
                assert by_script or name in provider.silent_about, f"{name}: set aside without a reason"

    def _order(self, now: Snapshot) -> None:
        """First come, first served: nobody gets stock before one who came surely earlier, and wants it."""
        for name, row in now.purchases.items():
            if self.given.get(name) != self.step:
                continue
            for other in now.of(row["item"], *WAITING):
                earlier = self.seen[other["id"].hex] < self.seen[name]
                assert not earlier, f"{name} got stock, and {other['id'].hex}, who came earlier, still waits"
        for name, step in self.refused.items():
            row = now.purchases[name]
            item = now.items[row["item"]]
            if row["status"] == Status.SOLD_OUT and item["waitlist"] and self.changed.get(row["item"], 0) < step:
                within_reach = item["available"] + item["unpaid"]
                assert row["quantity"] > within_reach, f"{name}: sold out, and {within_reach} are within reach"

    def _redis(self, now: Snapshot) -> None:
        """Redis may know less than Postgres, and never more, and it never goes back."""
        for name, (rev, status) in now.statuses.items():
            row = now.purchases[name]
            assert rev <= row["rev"], f"{name}: Redis is ahead of Postgres"
            if rev == row["rev"] or Status(status["status"]) in FINAL:
                assert status["status"] == row["status"], f"{name}: {status['status']} in Redis, is {row['status']}"
            was = self.before.statuses.get(name) if self.before else None
            assert was is None or rev >= was[0], f"{name}: its status in Redis went back"
        for lane, watermark in now.watermarks.items():
            assert watermark <= now.lanes[lane], f"lane {lane}: its watermark in Redis is ahead"
        for sku, door in now.doors.items():
            item = now.items[sku]
            assert int(door["rev"]) <= item["rev"], f"{sku}: its door record is ahead of Postgres"
            if int(door["rev"]) == item["rev"]:
                within_reach = item["available"] + (item["unpaid"] if item["waitlist"] else 0)
                assert int(door["within_reach"]) == within_reach, f"{sku}: its door record is wrong"

    def _calls(self, now: Snapshot) -> None:
        """A lane that nobody will hear of becomes one only by a fault."""
        if self.before is not None and not self.world.disturbed:
            new = now.forgotten() - self.before.forgotten()
            assert not new, f"lanes {sorted(new)}: work, or a mark, and no claim check"


@cache
def reachable(before: Status) -> frozenset[Status]:
    """Every state that a purchase may be in after any number of moves."""
    found, left = {before}, [before]
    while left:
        new = TRANSITIONS[left.pop()] - found
        found |= new
        left += new
    return frozenset(found)


def _parsed(text: str) -> tuple[int, dict[str, Any]]:
    rev, _, record = text.split("|", 2)
    return int(rev), json.loads(record)
