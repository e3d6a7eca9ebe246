"""The transition table: what may follow what, and that nothing follows the end."""

from __future__ import annotations

import pytest

from shared.states import AWAITING_OUTCOME, FINAL, HOLDING, TRANSITIONS, WAITING, Status, may_follow


def test_every_status_has_a_row() -> None:
    assert set(TRANSITIONS) == set(Status)


@pytest.mark.parametrize("status", sorted(FINAL))
def test_a_final_state_never_changes(status: Status) -> None:
    assert TRANSITIONS[status] == frozenset()


@pytest.mark.parametrize("status", sorted(set(Status) - FINAL))
def test_every_other_state_can_reach_a_final_one(status: Status) -> None:
    reachable, todo = set[Status](), [status]
    while todo:
        for after in TRANSITIONS[todo.pop()] - reachable:
            reachable.add(after)
            todo.append(after)
    assert reachable & FINAL


def test_every_state_is_reached_from_queued() -> None:
    reachable, todo = {Status.QUEUED}, [Status.QUEUED]
    while todo:
        for after in TRANSITIONS[todo.pop()] - reachable:
            reachable.add(after)
            todo.append(after)
    assert reachable == set(Status)


def test_nothing_is_confirmed_without_a_claim() -> None:
    before = {status for status in Status if may_follow(status, Status.CONFIRMED)}
    assert before == AWAITING_OUTCOME


def test_what_may_have_been_sent_is_not_called_off() -> None:
    for status in AWAITING_OUTCOME:
        assert not may_follow(status, Status.CANCELLED)
        assert not may_follow(status, Status.EXPIRED)


def test_a_charge_begins_only_from_a_hold() -> None:
    assert {status for status in Status if may_follow(status, Status.CHARGING)} == {Status.RESERVED}


def test_waiting_and_holding_are_apart() -> None:
    assert not WAITING & HOLDING
    assert not WAITING & FINAL
    assert {Status.CONFIRMED} == HOLDING & FINAL
