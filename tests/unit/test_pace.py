"""The pace of a lane, learned from its watermarks."""

from __future__ import annotations

import pytest

from producers.pace import Pace


def observed(*watermarks: int, every: float = 1.0) -> tuple[Pace, float]:
    """A lane that was seen with these watermarks, and when it was seen last."""
    pace = Pace()
    now = 1_000.0
    for place, decided_through in enumerate(watermarks):
        now = 1_000.0 + place * every
        pace.observe(3, decided_through, now)
    return pace, now


def test_an_even_pace_is_learned() -> None:
    pace, now = observed(0, 100, 200, 300, 400)
    assert pace.seconds(3, 1_400, 400, now) == 10
    assert pace.seconds(3, 1_401, 400, now) == 11
    assert pace.seconds(3, 401, 400, now) == 1
    # Without a watermark, the last one seen counts.
    assert pace.seconds(3, 1_400, None, now) == 10


def test_nothing_can_be_told_of_a_lane_not_seen_or_not_moving() -> None:
    assert Pace().seconds(3, 10, 0, 1_000.0) is None
    pace, now = observed(0, 100, 200, 300)
    assert pace.seconds(4, 1_300, 300, now) is None
    pace, now = observed(5, 5, 5, 5)
    assert pace.seconds(3, 10, 5, now) is None


def test_the_leap_over_what_other_lanes_took_is_no_pace() -> None:
    pace, now = observed(0, 1_000_000)
    assert pace.seconds(3, 1_000_100, 1_000_000, now) is None
    pace, now = observed(0, 1_000_000, 1_000_010, 1_000_020)
    assert pace.seconds(3, 1_000_120, 1_000_020, now) == 10


def test_a_pace_that_changes_is_followed() -> None:
    slow, now = observed(*range(0, 100, 10))
    assert slow.seconds(3, 190, 90, now) == 10
    for second in range(1, 31):
        slow.observe(3, 90 + 100 * second, now + second)
    faster = slow.seconds(3, 3_190, 3_090, now + 30)
    assert faster is not None
    assert faster <= 2


def test_a_lane_that_stands_still_makes_estimates_longer_and_at_last_none() -> None:
    pace, now = observed(0, 100, 200, 300)
    estimates = []
    for second in range(1, 401):
        pace.observe(3, 300, now + second)
        estimates.append(pace.seconds(3, 1_300, 300, now + second))
    told = [estimate for estimate in estimates if estimate is not None]
    assert told == sorted(told)
    assert told[0] < told[-1] <= 86_400
    assert estimates[-1] is None


@pytest.mark.parametrize("pause", [5.1, 3_600])
def test_after_a_time_unseen_a_lane_is_learned_anew(pause: float) -> None:
    pace, now = observed(0, 100, 200, 300)
    assert pace.seconds(3, 1_300, 300, now + pause) is None
    pace.observe(3, 5_000, now + pause)
    pace.observe(3, 5_100, now + pause + 1)
    assert pace.seconds(3, 6_100, 5_100, now + pause + 1) is None


def test_an_older_watermark_that_comes_late_changes_nothing() -> None:
    late, now = observed(0, 100, 200, 300)
    late.observe(3, 250, now + 0.6)
    assert late.seconds(3, 1_300, 300, now + 0.6) == 10
    late.observe(3, 400, now + 1)
    assert late.seconds(3, 1_400, 400, now + 1) == 10


def test_a_watermark_that_fell_for_good_is_learned_anew() -> None:
    restored, now = observed(10_000, 10_100, 10_200, 10_300)
    for second in range(1, 11):
        restored.observe(3, 100 * second, now + second)
    assert restored.seconds(3, 2_000, 1_000, now + 10) == 10


def test_samples_are_not_taken_within_a_batch() -> None:
    pace, now = observed(0, 50, 50, 100, 100, 150, 150, 200, every=0.25)
    assert pace.seconds(3, 1_200, 200, now) in range(9, 12)
