"""The circuit breaker: claims pause when calls fail as a group, and one probe ends the pause."""

from __future__ import annotations

from workers.breaker import Breaker, Circuit


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker()
    assert breaker.failed(at, alert=True)
    return breaker


def test_a_few_failures_among_many_calls_change_nothing() -> None:
    breaker = Breaker()
    for number in range(100):
        breaker.succeeded()
        breaker.succeeded()
        if number % 2:
            assert not breaker.failed(0.0)
    assert breaker.allows(64, 0.0) == 64


def test_it_opens_when_half_of_the_last_calls_failed() -> None:
    breaker = Breaker()
    assert [breaker.failed(0.0) for _ in range(10)] == [False] * 9 + [True]
    assert breaker.allows(64, 0.5) == 0


def test_a_wrong_key_opens_it_at_once() -> None:
    assert opened().allows(64, 0.5) == 0


def test_after_the_pause_one_call_probes_and_no_more() -> None:
    breaker = opened()
    assert breaker.allows(64, 1.0) == 1
    breaker.claimed()
    assert breaker.circuit is Circuit.PROBING
    assert breaker.allows(64, 5.0) == 0


def test_a_probe_that_finds_nothing_to_claim_leaves_the_next_one_to_probe() -> None:
    breaker = opened()
    assert breaker.allows(64, 1.0) == 1
    assert breaker.allows(64, 1.0) == 1


def test_a_probe_that_succeeds_closes_it() -> None:
    breaker = opened()
    breaker.claimed()
    breaker.succeeded()
    assert breaker.allows(64, 1.0) == 64


def test_the_pause_doubles_with_every_probe_that_fails_up_to_a_bound() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(8):
        pause = next(p for p in (1, 2, 4, 8, 16, 30, 60) if breaker.allows(1, now + p))
        pauses.append(pause)
        now += pause
        breaker.claimed()
        breaker.failed(now)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_calls_that_were_under_way_when_it_opened_do_not_lengthen_the_pause() -> None:
    breaker = opened()
    for _ in range(20):
        breaker.failed(0.9)
    assert breaker.allows(1, 1.0) == 1


def test_a_probe_that_tells_nothing_leaves_the_next_one_to_probe() -> None:
    breaker = opened()
    breaker.claimed()
    breaker.ended()
    assert breaker.allows(64, 1.0) == 1
