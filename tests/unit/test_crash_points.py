"""Crash points: each name is a place, a wrong name is refused, and an armed one kills."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from shared.crash_points import POINTS, armed, crash_point
from tests.processes.process import OwnedProcess

PASS_TWICE = """
from shared.crash_points import arm_from_environment, crash_point
arm_from_environment()
for number in range(3):
    print("pass", number, flush=True)
    crash_point("decide.before_commit")
"""


def test_every_point_is_a_place_in_the_code_and_the_other_way_round(project_root: Path) -> None:
    sources = [
        path.read_text()
        for package in ("producers", "workers", "shared")
        for path in (project_root / package).rglob("*.py")
    ]
    places = [name for source in sources for name in re.findall(r'crash_point\("([a-z_.]+)"\)', source)]
    assert sorted(places) == sorted(POINTS)


def test_an_unarmed_point_does_nothing_and_an_armed_one_is_told() -> None:
    reached: list[str] = []
    crash_point("accept.before_commit")
    with armed(reached.append):
        crash_point("accept.before_commit")
    crash_point("accept.after_commit")
    assert reached == ["accept.before_commit"]


@pytest.mark.parametrize(("wanted", "passes"), [("decide.before_commit", 1), ("decide.before_commit:3", 3)])
def test_a_process_dies_where_it_was_told_to(tmp_path: Path, project_root: Path, wanted: str, passes: int) -> None:
    argv = [sys.executable, "-c", PASS_TWICE]
    env = {"FAIRLANE_CRASH_AT": wanted}
    with OwnedProcess(argv, log=tmp_path / "log", env=env, cwd=project_root) as process:
        assert process.wait_exit(30) == -signal.SIGKILL
        assert process.logs().splitlines() == [f"pass {number}" for number in range(passes)]


def test_a_point_that_does_not_exist_is_refused(tmp_path: Path, project_root: Path) -> None:
    argv = [sys.executable, "-c", PASS_TWICE]
    env = {"FAIRLANE_CRASH_AT": "decide.sometime"}
    with OwnedProcess(argv, log=tmp_path / "log", env=env, cwd=project_root) as process:
        assert process.wait_exit(30) == 1
        assert process.logs().splitlines() == ["fairlane: FAIRLANE_CRASH_AT: there is no point decide.sometime"]
