from __future__ import annotations

import json

import pytest

from ops.bench.figures import figures
from ops.bench.report import as_json
from ops.bench.samples import FAIRLANE, Contender, Result, Sample, curve_of
from ops.bench.scenarios import hot_item, idle

PEER, SLOW_PEER = Contender("conditional UPDATE"), Contender("Redis lock, defaults")


def result(**rates: list[float]) -> Result:
    """A run of the hot item: so many per second in each round, by contender."""
    contenders = {"ours": FAIRLANE, "peer": PEER, "slow": SLOW_PEER, "limit": hot_item.SQL_LOOP}
    samples = {
        contenders[name]: [Sample(int(rate * 10), 10.0, cpu={"web": rate / 100}) for rate in of_rounds]
        for name, of_rounds in rates.items()
    }
    return Result(hot_item.NAME, "hot", "purchases", samples)


def test_a_ratio_is_the_median_of_those_of_the_rounds() -> None:
    # The machine was four times as fast in the second round: medians of the rates would say 25.
    found = result(ours=[100, 400, 1000], peer=[10, 40, 40])
    assert found.ratio("Fairlane", "conditional UPDATE") == 10
    assert found.rate("Fairlane") == 400


def test_rounds_that_cannot_be_paired_are_no_ratio() -> None:
    with pytest.raises(ValueError, match="zip"):
        result(ours=[1, 2], peer=[1]).ratio("Fairlane", "conditional UPDATE")


def test_the_best_peer_is_neither_fairlane_nor_a_limit() -> None:
    found = result(ours=[100], peer=[20], slow=[10], limit=[1000])
    assert found.best_peer() == "conditional UPDATE"


def test_processor_time_is_for_a_thousand_and_a_curve_has_every_hundredth() -> None:
    assert result(ours=[100]).cpu_per_1000("Fairlane") == {"web": 1.0}
    curve = curve_of([number / 1000 for number in range(1001)])
    assert (curve[0], curve[50], curve[99], curve[100], len(curve)) == (0.0, 0.5, 0.99, 1.0, 101)
    assert curve_of([]) == ()
    assert Sample(1, 1.0).p99 is None


def test_a_figure_says_whether_it_was_reached_and_is_missing_where_nothing_was_measured() -> None:
    reached = figures([result(ours=[1000], peer=[100], limit=[4000])])
    assert [(figure.seen, figure.met) for figure in reached] == [("0.25×", False), ("10×", True)]
    calm = Result(idle.NAME, "idle", "ms", {FAIRLANE: [Sample(1, 1.0)]}, {idle.SHARE: 0.029})
    assert [figure.met for figure in figures([calm])] == [True]
    assert figures([]) == []


def test_the_json_has_the_medians_and_every_round() -> None:
    found = result(ours=[100, 300, 200], peer=[10, 10, 10], limit=[400, 400, 400])
    told = json.loads(json.dumps(as_json([found], figures([found]), rounds=3, quick=True)))
    (ours, *_) = told["scenarios"][0]["contenders"]
    assert (ours["name"], ours["per_second"], len(ours["rounds"])) == ("Fairlane", 200, 3)
    assert told["figures"][1]["met"] is True
