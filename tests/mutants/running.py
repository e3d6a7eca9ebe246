"""Running named tests in a copy of the tree, and what became of each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from xml.etree import ElementTree

#: Seconds for a run, per test in it: pytest ends a test that hangs after 120, and this a pytest that hangs itself.
_LIMIT = 300

#: A patch that leaves broken code behind turns every test red and shows nothing.
_BROKEN = re.compile(r"^(?:\w+\.)*(?:NameError|UnboundLocalError|ImportError|ModuleNotFoundError|SyntaxError)\b")
_BROKEN_SQL = re.compile(r"psycopg\.errors\.(?:SyntaxError|Undefined\w+|Ambiguous\w+)")


class Seen(StrEnum):
    """What a run showed of one test."""

    PASSED = "passed"  #: every case of it
    FAILED = "failed"  #: one of its cases, in the test itself
    BROKEN = "broken"  #: it could not be run: not collected, a fixture failed, or the code makes no sense


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a test; `how` is the first line of its failure."""

    seen: Seen
    how: str = ""


def run_tests(tree: Path, tests: Sequence[str], scratch: Path) -> dict[str, Result]:
    """Run these tests on the code in `tree`, and nothing of the installed project; `scratch` is for their files."""
    scratch.mkdir(parents=True, exist_ok=True)
    report = scratch / "report.xml"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = [f"--junitxml={report}", f"--basetemp={scratch / 't'}", f"--rootdir={tree}"]
    try:
        ran = subprocess.run(
            [*pytest, *options, *tests],
            cwd=tree, env=environment(tree), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=_LIMIT * len(tests),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return dict.fromkeys(tests, Result(Seen.BROKEN, f"not over after {_LIMIT * len(tests)} s"))
    # 0: all passed, 1: some failed. Anything else (nothing collected, wrong usage, a crash) shows nothing of a test.
    if ran.returncode not in (0, 1) or not report.exists():
        last = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()][-1:]
        return dict.fromkeys(tests, Result(Seen.BROKEN, f"pytest ended with {ran.returncode}: {' '.join(last)}"))
    return {test: _result(test, report) for test in tests}


def environment(tree: Path) -> dict[str, str]:
    """The environment in which `tree` is the project: for pytest, and for every process that its tests start.

    The virtual environment links the project in by a `.pth` file, which comes after PYTHONPATH.
    """
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": ""}


def _result(test: str, report: Path) -> Result:
    """What a report says of one test, all its cases together."""
    file, _, name = test.partition("::")
    module = file.removesuffix(".py").replace("/", ".")
    cases = [case for case in ElementTree.parse(report).iter("testcase") if _is_case_of(case, module, name)]  # noqa: S314  # pytest wrote it
    if not cases:
        return Result(Seen.BROKEN, "it was not run")
    failures = [_first_line(failure) for case in cases for failure in case.iter("failure")]
    errors = [_first_line(error) for case in cases for error in case.iter("error")]
    told = [how for how in failures if not _BROKEN.search(how) and not _BROKEN_SQL.search(how)]
    if told:
        return Result(Seen.FAILED, told[0])
    if failures or errors:
        return Result(Seen.BROKEN, [*failures, *errors][0])
    if any(case.find("skipped") is not None for case in cases):
        return Result(Seen.BROKEN, "it was skipped")
    return Result(Seen.PASSED)


def _is_case_of(case: ElementTree.Element, module: str, name: str) -> bool:
    *classes, function = name.split("::")
    named = case.get("name", "")
    # Without a case in the name all its cases are meant.
    same = named == function or ("[" not in function and named.partition("[")[0] == function)
    return same and case.get("classname") == ".".join([module, *classes])


def _first_line(failure: ElementTree.Element) -> str:
    return (failure.get("message") or failure.text or "").strip().partition("\n")[0]
