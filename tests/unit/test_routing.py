"""From sku to lane to queue, and Celery's router."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.routing import CHARGE, DECIDE, Router, lane_of, queue_of, queues

skus = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)


@given(sku=skus, lanes=st.integers(1, 100))
def test_an_item_always_has_the_same_lane(sku: str, lanes: int) -> None:
    assert lane_of(sku, lanes) == crc32(sku.encode("ascii")) % lanes
    assert 0 <= lane_of(sku, lanes) < lanes


def test_the_lane_of_an_item_never_changes_between_versions() -> None:
    # Rows carry their lane. These are frozen values: a change would look for purchases where they are not.
    assert [lane_of(sku, 16) for sku in ("sku-1", "sku-2", "tee", "Poster_A2.v1")] == [14, 4, 11, 3]


@given(count=st.integers(1, 5_000))
def test_lanes_share_items_evenly(count: int) -> None:
    lanes = {lane_of(f"sku-{n}", 16) for n in range(max(count, 400))}
    assert lanes == set(range(16))


def test_queues_are_one_per_lane_and_the_charges() -> None:
    assert queues(3) == ["lane.00", "lane.01", "lane.02", "charges"]
    assert len(set(queues(100))) == 101


@given(sku=skus)
def test_a_decide_task_goes_to_its_items_queue(sku: str) -> None:
    route = Router(16)
    by_sku = route(DECIDE, [], {"sku": sku}, {})
    assert by_sku == {"queue": queue_of(lane_of(sku, 16))}
    assert route(DECIDE, [], {"lane": lane_of(sku, 16)}, {}) == by_sku


def test_a_charge_task_goes_to_the_charges() -> None:
    assert Router(16)(CHARGE, [], {}, {}) == {"queue": "charges"}


def test_other_tasks_are_not_ours_to_route() -> None:
    assert Router(16)("celery.ping", [], {}, {}) is None


@pytest.mark.parametrize("kwargs", [{}, {"lane": 16}, {"lane": -1}, {"lane": "7"}, {"sku": 7}])
def test_a_decide_task_without_a_lane_is_an_error(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs a lane below 16 or a sku"):
        Router(16)(DECIDE, [], kwargs, {})
