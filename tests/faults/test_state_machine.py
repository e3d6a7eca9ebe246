"""Anything may fail, at any moment, in any order: Hypothesis looks for a sequence that breaks a promise.

The statements, the servers and the parts are the real ones; the provider and the clock are scripted. A process may die
before or after each of its effects, or stop there and go on when everybody has given it up; claim checks are lost or
come twice; Redis is wiped; hours pass. After every step all that is committed is compared with what was promised
(`invariants`), and at the end of a sale everything heals and everybody gets an answer.

    STATE_MACHINE_EXAMPLES=2000 pytest tests/faults/test_state_machine.py     a long run
    pytest tests/faults/test_state_machine.py --hypothesis-seed=7             the same examples again

What fails is printed as a program of steps; `.hypothesis` keeps it, and the next run tries it first.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import hypothesis
import pytest
import structlog
from hypothesis import HealthCheck, Phase, currently_in_test_context, event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from producers.accept import Order
from shared.crash_points import POINTS
from shared.settings import Settings
from shared.states import FINAL, HOLDING, Status
from tests.faults.draws import (
    CHANGES,
    CRASHES,
    DOINGS,
    DUE,
    FREEZES,
    INDEX,
    ITEMS,
    LONG,
    ORDERS,
    OUTCOMES,
    PACES,
    SKUS,
    STOCKS,
    TIMES,
    WANTED,
    Doings,
    Pace,
    Wanted,
    fault,
    faults,
)
from tests.faults.invariants import History, Snapshot
from tests.faults.processes_that_fail import Crashed, Fault, FaultKind, Frozen, Report
from tests.faults.scripted_provider import PROVIDER_POINTS, Behaviour
from tests.faults.stage import FROZEN_AT_MOST, Doing
from tests.faults.world import Asked, Terms, World, open_world

#: Sales per run, and steps in each: half a minute. No settings of Fairlane, so they survive `_no_inherited_settings`.
USUAL = 25
EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", USUAL))
STEPS = int(os.environ.get("STATE_MACHINE_STEPS", "25"))
#: Looking for the shortest program that fails takes Hypothesis up to five minutes; `STATE_MACHINE_SHRINK=0` leaves it.
PHASES = tuple(Phase) if os.environ.get("STATE_MACHINE_SHRINK", "1") != "0" else (Phase.reuse, Phase.generate)

#: Who tries to cancel after their purchase was decided: mostly those who can.
CANCELLED_FROM = (Status.WAITLISTED, Status.RESERVED, Status.CHARGING)

#: What a run reaches, or it proves nothing.
MUST_HAPPEN = (
    Status.RESERVED,
    Status.WAITLISTED,
    Status.IN_DOUBT,
    Status.CONFIRMED,
    Status.DECLINED,
    Status.SOLD_OUT,
    "cancelled while queued",
    "cancelled while reserved",
    "cancelled while waitlisted",
    "too late to cancel",
    "flush",
    "messages lost",
    "lanes found again",
    "second call",
    "woken after others took over",
)


class Sale(RuleBasedStateMachine):
    """One sale in which anything may happen."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self._history = History(self.world)
        self._number = 0
        self._open = False

    @initialize(
        stocks=st.tuples(*[STOCKS] * len(ITEMS)),
        limit=st.sampled_from((None, 2)),
        orders=ORDERS,
    )
    def opens(self, stocks: tuple[int, ...], limit: int | None, orders: list[Wanted]) -> None:
        tea, jar, mug, pen = stocks
        self.world.begin(
            {
                "tea": Terms(tea),
                "jar": Terms(jar, per_customer=limit),
                "mug": Terms(mug, waitlist=False),
                "pen": Terms(pen, hold_seconds=60),
            }
        )
        self._are_due(orders)
        self._open = True

    # What happens

    @rule(orders=ORDERS, fault=faults("buy"))
    def buyers_come(self, orders: list[Wanted], fault: Fault | None) -> None:
        self._run(self._buy(orders), fault)

    @rule(index=INDEX, fault=faults("buy"))
    def a_buyer_asks_again(self, index: int, fault: Fault | None) -> None:
        self._run(self.world.buy(self._asked(index)), fault)

    @rule(order=WANTED, fault=faults("buy"))
    def one_key_comes_to_two_doors(self, order: Wanted, fault: Fault | None) -> None:
        asked = self._new(*order)
        self._run_both((self.world.buy(asked), fault), (self.world.buy(asked), None))

    @rule(index=INDEX)
    def a_key_comes_with_another_body(self, index: int) -> None:
        asked = self._asked(index)
        if asked.purchase is not None:
            self._run(self.world.buy_something_else(asked), None)

    @rule(order=WANTED, fault=faults("cancel"))
    def a_buyer_changes_their_mind(self, order: Wanted, fault: Fault | None) -> None:
        self.world.run(self._buy([order]))
        self._run(self._cancel(self._asked(-1)), fault)

    @rule(orders=ORDERS, standing=st.sampled_from(CANCELLED_FROM), index=INDEX, fault=faults("cancel"))
    def a_buyer_cancels(self, orders: list[Wanted], standing: Status, index: int, fault: Fault | None) -> None:
        self._are_due(orders)
        found = self.world.standing(standing) or self.world.asked
        self._run(self._cancel(found[index % len(found)]), fault)

    @rule(orders=DUE, index=INDEX, behaviours=OUTCOMES, pace=PACES)
    def a_buyer_cancels_while_charges_are_made(
        self, orders: list[Wanted], index: int, behaviours: list[Behaviour], pace: Pace
    ) -> None:
        self._are_due(orders)
        found = self.world.standing(Status.RESERVED) or self.world.asked
        cancelling = self._cancel(found[index % len(found)])
        self._run_both((cancelling, None), (self.world.charge(behaviours), None), pace=pace)

    @rule(sku=SKUS, heard=st.booleans(), fault=faults("decide"))
    def a_lane_is_decided(self, sku: str, heard: bool, fault: Fault | None) -> None:
        self._run(self.world.decide(sku, heard=heard), fault)

    @rule(orders=DUE, behaviours=OUTCOMES, heard=st.booleans())
    def charges_are_made(self, orders: list[Wanted], behaviours: list[Behaviour], heard: bool) -> None:
        self._are_due(orders)
        self._run(self.world.charge(behaviours, heard=heard), None)

    @rule(orders=ORDERS, behaviours=OUTCOMES, fault=fault("charge"))
    def a_charger_fails(self, orders: list[Wanted], behaviours: list[Behaviour], fault: Fault) -> None:
        self._are_due(orders)
        self._run(self.world.charge(behaviours), fault)

    @rule(orders=ORDERS, behaviours=OUTCOMES, fault=fault("charge"), seconds=LONG, again=OUTCOMES, woken=st.booleans())
    def a_charger_fails_and_others_take_over(
        self,
        orders: list[Wanted],
        behaviours: list[Behaviour],
        fault: Fault,
        seconds: int,
        again: list[Behaviour],
        woken: bool,
    ) -> None:
        self.a_charger_fails(orders, behaviours, fault)
        for _ in range(2):
            self.the_promises_are_kept()
            self.the_others_carry_on(seconds, again)
        self.the_promises_are_kept()
        if woken:
            self.world.wake(-1)

    @rule(silent=st.booleans(), fault=faults("reconcile"))
    def the_provider_is_asked(self, silent: bool, fault: Fault | None) -> None:
        self._run(self.world.reconcile(silent=silent), fault)

    @rule(fault=faults("sweep"))
    def the_sweep_comes(self, fault: Fault | None) -> None:
        self._run(self.world.sweep(), fault)

    @rule(sku=SKUS, change=CHANGES, fault=faults("put"))
    def stock_changes(self, sku: str, change: int, fault: Fault | None) -> None:
        self._run(self.world.restock(sku, change), fault)

    @rule(
        first=DOINGS.flatmap(lambda doing: st.tuples(st.just(doing), faults(doing[0]))),
        second=DOINGS,
        pace=PACES,
        orders=DUE,
    )
    def two_work_at_once(
        self, first: tuple[Doings, Fault | None], second: Doings, pace: Pace, orders: list[Wanted]
    ) -> None:
        self._are_due(orders)
        doing, fault = first
        self._run_both((self._doing(*doing), fault), (self._doing(*second), None), pace=pace)

    @rule(sku=SKUS, behaviours=OUTCOMES, pace=PACES)
    def a_claim_check_comes_twice(self, sku: str, behaviours: list[Behaviour], pace: Pace) -> None:
        self._run_both(*[(self.world.decide(sku), None) for _ in range(2)], pace=pace)
        self._run_both(*[(self.world.charge(behaviours), None) for _ in range(2)], pace=pace)

    @rule(order=WANTED, left=st.integers(0, 2), pace=PACES)
    def stock_is_taken_away_while_a_lane_is_decided(self, order: Wanted, left: int, pace: Pace) -> None:
        self.world.run(self._buy([order]))
        sku = order[0]
        self._run_both((self.world.decide(sku), None), (self.world.leave(sku, left), None), pace=pace)

    @rule(behaviours=OUTCOMES)
    def every_message_is_taken(self, behaviours: list[Behaviour]) -> None:
        self.world.deliver_everything(behaviours)

    @rule(seconds=TIMES, behaviours=OUTCOMES)
    def the_others_carry_on(self, seconds: int, behaviours: list[Behaviour]) -> None:
        self.world.let_time_pass(seconds)
        self.world.run(self.world.sweep())
        self.world.deliver_everything(behaviours)

    @rule()
    def messages_are_lost(self) -> None:
        self.world.lose_messages()

    @rule()
    def redis_is_flushed(self) -> None:
        self.world.flush()

    @rule(seconds=TIMES)
    def time_passes(self, seconds: int) -> None:
        self.world.let_time_pass(seconds)

    @rule(index=INDEX)
    def somebody_wakes_up(self, index: int) -> None:
        self.world.wake(index)

    # What holds

    @invariant()
    def the_promises_are_kept(self) -> None:
        if self._open:
            with self.world.telling_its_story():
                self._history.check()

    def teardown(self) -> None:
        going_well = sys.exc_info()[0] is None
        self.world.wake_everybody()
        if going_well and self._open:
            with self.world.telling_its_story():
                self._heal()

    def _heal(self) -> None:
        """Whoever froze wakes, whoever heard nothing asks again, workers come and the provider is well."""
        before = self._history.check()
        winners = {name for name, row in before.purchases.items() if self._can_still_win(row)}
        self.world.run(self.world.buy(*self.world.asked))
        now = before
        for _ in range(12):
            self.world.let_time_pass(30)
            for _ in range(3):
                self.world.let_time_pass(3)
                self.world.run(self.world.sweep())
                self.world.deliver_everything()
            now = self._history.check()
            if self._is_over(now):
                break
        else:
            raise AssertionError(f"not over: {[row['status'] for row in now.purchases.values()]}")
        assert {asked.purchase for asked in self.world.asked} == now.purchases.keys()
        for name, row in now.purchases.items():
            if row["status"] == Status.CONFIRMED:
                assert len(self.world.provider.executed(name)) == 1, f"{name}: confirmed and charged twice"
        for name in winners:
            lost = now.purchases[name]["status"] not in (Status.CONFIRMED, Status.DECLINED, Status.NEEDS_REVIEW)
            assert not lost, f"{name}: had stock, and is {now.purchases[name]['status']}"
        self.world.noticed["sales that ended well"] += 1
        self.world.noticed["lanes found again"] += len(before.forgotten())

    @staticmethod
    def _is_over(now: Snapshot) -> bool:
        """Everybody has an answer, apart from those who need an operator, and those who wait for their stock."""
        unclear = {row["item"] for row in now.purchases.values() if row["status"] == Status.NEEDS_REVIEW}
        return all(
            row["status"] in FINAL
            or row["status"] == Status.NEEDS_REVIEW
            or (row["status"] == Status.WAITLISTED and row["item"] in unclear)
            for row in now.purchases.values()
        )

    @staticmethod
    def _can_still_win(row: dict[str, Any]) -> bool:
        """Whether it has stock that it should not lose any more: a hold that lasts, or an attempt."""
        return row["status"] in HOLDING - {Status.RESERVED, Status.NEEDS_REVIEW}

    # How

    def do(self, verb: str, what: Any, fault: Fault | None) -> list[Report]:
        """One process does this."""
        return self._run(self._doing(verb, what), fault)

    def _new(self, sku: str, quantity: int, customer: str) -> Asked:
        self._number += 1
        asked = Asked(Order("shop", f"key-{self._number}", sku, quantity, customer, "tok_visa"))
        self.world.asked.append(asked)
        return asked

    def _asked(self, index: int) -> Asked:
        return self.world.asked[index % len(self.world.asked)]

    def _cancel(self, asked: Asked) -> Doing:
        """This buyer cancels, if they know of a purchase; otherwise they go on asking for it."""
        return self.world.buy(asked) if asked.purchase is None else self.world.cancel(asked)

    def _buy(self, orders: list[Wanted]) -> Doing:
        return self.world.buy(*(self._new(*order) for order in orders))

    def _are_due(self, orders: list[Wanted]) -> None:
        if orders:
            self.world.run(self._buy(orders))
        for sku in {self.world.lane(sku): sku for sku, _, _ in orders}.values():
            self.world.run(self.world.decide(sku))

    def _doing(self, verb: str, what: Any) -> Doing:
        world = self.world
        match verb:
            case "decide":
                return world.decide(what)
            case "charge":
                return world.charge(what)
            case "reconcile":
                return world.reconcile()
            case "sweep":
                return world.sweep()
            case "buy":
                return self._buy(what)
            case "cancel":
                return self._cancel(self._asked(what))
            case _:
                return world.restock(*what)

    def _run(self, doing: Doing, fault: Fault | None) -> list[Report]:
        return self._run_both((doing, fault))

    def _run_both(self, *doings: tuple[Doing, Fault | None], pace: tuple[float, ...] = (0.0, 0.0)) -> list[Report]:
        works = [
            (replace(doing, slow=slow), self._allowed(fault))
            for (doing, fault), slow in zip(doings, pace, strict=False)
        ]
        reports = self.world.run_at_once(works)
        for report in reports:
            if isinstance(report, Crashed | Frozen) and currently_in_test_context():
                event(f"{type(report).__name__} at {report.point}")
        return reports

    def _allowed(self, fault: Fault | None) -> Fault | None:
        too_many = len(self.world.frozen) >= FROZEN_AT_MOST
        return None if fault is not None and fault.kind is FaultKind.FREEZE and too_many else fault


@pytest.fixture
def world(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world with batches so small that one sale fills several, and with charges on its clock."""
    small = settings.model_copy(
        update={
            "accept_batch": 3,
            "decide_batch": 2,
            "charge_slots": 2,
            "database_pool": 2,
            "never_charged_limit": 2,  # so that it is reached
        }
    )
    with open_world(small) as opened:
        monkeypatch.setattr("workers.charge.time", opened.clock)
        monkeypatch.setattr(Sale, "world", opened, raising=False)
        structlog.configure(processors=[opened.hears])
        yield opened
        structlog.reset_defaults()
    gc.collect()  # whoever crashed closed nothing: what is left goes now, and not in a test that would be blamed


def test_every_point_is_drawn() -> None:
    assert {point for points in CRASHES.values() for point in points} == POINTS | PROVIDER_POINTS
    assert all(set(FREEZES[verb]) <= set(points) for verb, points in CRASHES.items())


def test_whoever_stops_anywhere_and_wakes_up_late_changes_nothing(world: World) -> None:
    sale = Sale()
    sale.opens((30, 30, 30, 30), None, [("tea", 1, "ann")])
    for verb, points in FREEZES.items():
        for point in points:
            if verb != "buy":
                sale.buyers_come([("tea", 1, "ann"), ("jar", 1, "bob")], None)
            if verb in ("charge", "reconcile"):
                sale.a_lane_is_decided("tea", heard=True, fault=None)
            if verb == "reconcile":
                sale.charges_are_made([], [Behaviour.LOST] * 2, heard=True)
                sale.time_passes(90)
                sale.the_sweep_comes(None)
            what = {"buy": [("tea", 1, "ann")], "decide": "tea", "charge": [], "cancel": -1}.get(verb)
            (report,) = sale.do(verb, what, Fault(FaultKind.FREEZE, point))
            assert report == Frozen(point), f"{verb} did not stop at {point}"
            for _ in range(2):
                sale.the_promises_are_kept()
                sale.the_others_carry_on(90, [Behaviour.LOST])
            sale.the_promises_are_kept()
            sale.somebody_wakes_up(0)
            sale.the_promises_are_kept()
    sale.teardown()
    assert world.noticed["too late to send"]
    assert world.noticed["woken after others took over"]


@pytest.mark.timeout(600 + EXAMPLES * 60)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:The garbage collector is trying to clean up")
def test_the_promises_hold_whatever_fails(world: World) -> None:
    try:
        run_state_machine_as_test(
            Sale,
            settings=hypothesis.settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                # The usual run is the same every time, as it must reach everything that it asks for below; a long one
                # looks further each time.
                derandomize=EXAMPLES == USUAL,
                print_blob=True,
                phases=PHASES,
                # One step asks two servers some twenty questions: slower than what these checks are made for.
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            ),
        )
    finally:
        print(*(f"{times:6} {what}" for what, times in sorted(world.noticed.items())), sep="\n")
    assert world.deadlocks() == 0
    if EXAMPLES >= USUAL:
        reached = Counter(what.partition(" at ")[0] for what in world.noticed)
        assert reached["crashed"] >= 6, "hardly anything crashed"
        assert reached["frozen"] >= 4, "hardly anything froze"
        for what in MUST_HAPPEN:
            assert world.noticed[what], f"never seen: {what}"
