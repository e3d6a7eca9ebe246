"""Crash points: each name is a place, a wrong name is refused, and an armed one kills or stops."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from shared.crash_points import POINTS, armed, crash_point
from tests.processes.process import OwnedProcess, wait_for

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


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [("decide.before_commit", 1), ("decide.before_commit:3", 3), ("decide.before_commit:2:kill", 2)],
)
def test_a_process_dies_where_it_was_told_to(tmp_path: Path, project_root: Path, wanted: str, passes: int) -> None:
    argv = [sys.executable, "-c", PASS_TWICE]
    env = {"FAIRLANE_CRASH_AT": wanted}
    with OwnedProcess(argv, log=tmp_path / "log", env=env, cwd=project_root) as process:
        assert process.wait_exit(30) == -signal.SIGKILL
        assert process.logs().splitlines() == [f"pass {number}" for number in range(passes)]


@pytest.mark.parametrize("wanted", ["decide.before_commit:2:stop", "{folder}/"])
def test_a_process_freezes_where_it_was_told_to_and_goes_on(tmp_path: Path, project_root: Path, wanted: str) -> None:
    folder = tmp_path / "points"
    folder.mkdir()
    argv = [sys.executable, "-c", PASS_TWICE]
    env = {"FAIRLANE_CRASH_AT": wanted.format(folder=folder)}
    (folder / "decide.before_commit").write_text("stop")
    (folder / "decide.after_commit").write_text("kill")  # not passed
    with OwnedProcess(argv, log=tmp_path / "log", env=env, cwd=project_root) as process:
        assert wait_for(lambda: process.paused, 30)
        passed = process.logs().splitlines()
        assert len(passed) == (2 if wanted.startswith("decide") else 1)
        process.resume()
        assert process.wait_exit(30) == 0
        assert process.logs().splitlines() == ["pass 0", "pass 1", "pass 2"]
        taken = {f"decide.before_commit.{process.pid}"} if "folder" in wanted else {"decide.before_commit"}
        assert {path.name for path in folder.iterdir()} == {"decide.after_commit", *taken}


def test_a_file_kills_the_first_of_several_processes_and_no_other(tmp_path: Path, project_root: Path) -> None:
    argv = [sys.executable, "-c", PASS_TWICE]
    env = {"FAIRLANE_CRASH_AT": f"{tmp_path}/"}
    (tmp_path / "decide.before_commit").write_text("kill")
    codes = []
    for number in range(2):
        with OwnedProcess(argv, log=tmp_path / f"log.{number}", env=env, cwd=project_root) as process:
            codes.append(process.wait_exit(30))
    assert codes == [-signal.SIGKILL, 0]


def test_a_point_that_does_not_exist_is_refused(tmp_path: Path, project_root: Path) -> None:
    argv = [sys.executable, "-c", PASS_TWICE]
    env = {"FAIRLANE_CRASH_AT": "decide.sometime"}
    with OwnedProcess(argv, log=tmp_path / "log", env=env, cwd=project_root) as process:
        assert process.wait_exit(30) == 1
        assert process.logs().splitlines() == ["fairlane: FAIRLANE_CRASH_AT: there is no point decide.sometime"]


@pytest.mark.parametrize("wanted", ["decide.before_commit:often", "decide.before_commit:1:sleep"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, project_root: Path, wanted: str) -> None:
    argv = [sys.executable, "-c", PASS_TWICE]
    with OwnedProcess(argv, log=tmp_path / "log", env={"FAIRLANE_CRASH_AT": wanted}, cwd=project_root) as process:
        assert process.wait_exit(30) == 1
        assert process.logs().splitlines() == [
            f"fairlane: FAIRLANE_CRASH_AT: {wanted} is not point, point:times or point:times:kill|stop"
        ]
