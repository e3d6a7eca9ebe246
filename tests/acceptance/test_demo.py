"""The demo as a user runs it, with a small crowd: the whole sale, two at once, and Ctrl-C in the middle."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from ops.catalogue import read_catalogue
from ops.demo.crowd import CATALOGUE, HOT, Manner, hot_units_to_sell, plan_crowd
from tests.processes.process import OwnedProcess, processes_for, wait_for

FAIRLANE = str(Path(sys.executable).with_name("fairlane"))

#: A demo of few buyers takes some 25 s on two cores, two at once some 45, and a loaded machine twice as long.
DEMO_WITHIN = 200

BUYERS = 200


def demo(directory: Path, *options: str) -> OwnedProcess:
    """A demo whose temporary folder lies in `directory`, by which everything it starts is known."""
    directory.mkdir()
    return OwnedProcess(
        [FAIRLANE, "demo", "--plain", "--buyers", str(BUYERS), *options],
        log=directory / "demo.log",
        env={"TMPDIR": str(directory)},
        cwd=directory,
        name="demo",
    )


def left_behind(directory: Path) -> list[str]:
    """Processes that were started in, with or for `directory`, and temporary folders in it."""
    return [*map(str, directory.glob("fairlane-demo-*")), *processes_for(directory)]


def shown(log: str, row: str) -> list[str]:
    """The cells of a row of the final table; the audit prints a table before it."""
    *_, line = [line for line in log.splitlines() if line.startswith(f"│ {row}")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


@pytest.mark.timeout(2 * DEMO_WITHIN)
def test_two_demos_side_by_side_sell_audit_and_leave_nothing(tmp_path: Path) -> None:
    lines = read_catalogue(CATALOGUE).lines
    with demo(tmp_path / "one", "--seed", "1") as one, demo(tmp_path / "two", "--seed", "2") as two:
        for seed, process in ((1, one), (2, two)):
            code = process.wait_exit(DEMO_WITHIN)
            log = process.logs()
            assert code == 0, log
            expected = hot_units_to_sell(plan_crowd(lines, BUYERS, seed), 500)
            assert shown(log, f"sold of {HOT}")[0] == f"{expected} of 500"
            for row in ("oversold", "charged twice", "paid but unconfirmed", "lost", "one key, two purchases"):
                assert shown(log, row)[0] == "0", row
            assert "Stock, purchases and the provider's books agree." in log
            assert re.search(r"[1-9]\d* declined", log)
            assert re.search(r"\d+ in 5 s", shown(log, f"sold of {HOT}")[1])
            assert "Every invariant holds." in log
    assert left_behind(tmp_path) == []


@pytest.mark.timeout(2 * DEMO_WITHIN)
@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [("Imported", signal.SIGINT, 130), ("Everything stays up", signal.SIGTERM, 143)],
)
def test_interrupted_it_leaves_nothing(tmp_path: Path, moment: str, number: int, code: int) -> None:
    with demo(tmp_path / "demo", "--keep") as process:
        process.wait_ready(lambda: moment in process.logs(), DEMO_WITHIN)
        process.send_signal(number)
        assert wait_for(lambda: not process.alive, DEMO_WITHIN), process.logs()
        assert left_behind(tmp_path) == []
        assert process.kill() == code
        assert "Traceback" not in process.logs()
    if moment == "Everything stays up":
        for word in ("/docs", "Flower", "password"):
            assert word in process.logs()


def test_the_crowd_is_as_announced_and_the_same_for_the_same_seed() -> None:
    lines = read_catalogue(CATALOGUE).lines
    crowd = plan_crowd(lines, 2_000, seed=1)
    assert crowd == plan_crowd(lines, 2_000, seed=1)
    assert crowd != plan_crowd(lines, 2_000, seed=2)
    assert len(crowd) == len({buyer.key for buyer in crowd}) == len({buyer.customer for buyer in crowd}) == 2_000
    assert sum(buyer.sku == HOT for buyer in crowd) == 1_500
    assert sum(not buyer.good for buyer in crowd) == 200
    repeating = [buyer for buyer in crowd if buyer.requests > 1]
    assert len(repeating) == 400
    assert {buyer.manner for buyer in repeating} == {Manner.TWINS, Manner.AGAIN, Manner.LOST}
    assert hot_units_to_sell(crowd, 500) == 500
    assert {buyer.sku for buyer in crowd} == {line.sku for line in lines}
