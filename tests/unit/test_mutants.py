"""The mutants that `make mutants` runs are in order: each applies, says what it takes away, and names tests."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants.judging import Row, Verdict, judge
from tests.mutants.patches import Mutant, all_mutants, chosen
from tests.mutants.refreshing import difference
from tests.mutants.running import Result, Seen, environment, run_tests
from tests.mutants.trees import apply, copy_tree, project_files
from tests.named_tests import missing_tests

MUTANTS = all_mutants()

#: The lines that must each have a mutant, and which these are.
SAFETY_LINES = {
    "DEL before the read": {"mark-deleted-before-the-read", "mark-deleted-at-all", "mark-deleted-after-the-lock"},
    "the row lock": {"lane-row-lock", "items-row-lock"},
    "NOWAIT": {"nowait-in-later-batches", "first-batch-waits"},
    "the fence": {"fence-of-the-outcome", "final-states-never-change"},
    "start_by": {"start-by-at-the-moment-of-writing", "start-by-counted-from-before-the-claim"},
    "intent before call": {"intent-committed-before-the-call"},
    "the lock around the call": {"lock-around-the-call", "no-call-without-the-lock", "no-call-without-redis"},
    "owner check at release": {"owner-compared-at-release", "owner-compared-at-extension", "owner-has-a-nonce"},
    "settle window": {"settle-window", "settle-window-added-to-the-deadline"},
    "CHECKs": {"check-never-oversold", "check-charged-when-confirmed", "check-claimed-with-a-fence"},
    "ON CONFLICT": {"on-conflict-do-nothing"},
    "sorted inserts": {"inserts-sorted-by-key"},
    "lookup before refusal": {"key-looked-up-before-refusal", "key-looked-up-when-full"},
    "commit before 202": {"commit-before-202"},
    "version check on statuses": {"newer-statuses-stay", "newer-doors-stay"},
}

#: Where the lines are that keep promises. A mutant of a test would prove nothing.
PRODUCT = ("producers", "workers", "shared", "ops")

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patches, and it is not installed")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the project, for tests that leave it as it was."""
    copy = copy_tree(tmp_path_factory.mktemp("mutants") / "tree")
    yield copy
    shutil.rmtree(copy)


def test_every_safety_line_has_its_mutants() -> None:
    names = {mutant.name.partition("-")[2] for mutant in MUTANTS}
    assert {line: wanted - names for line, wanted in SAFETY_LINES.items() if wanted - names} == {}


def test_every_number_is_one_mutants() -> None:
    numbers = [mutant.number for mutant in MUTANTS]
    assert all(re.fullmatch(r"\d{2,3}", number) for number in numbers)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_says_what_it_is(mutant: Mutant) -> None:
    assert mutant.promise.endswith(".")
    assert len(mutant.promise.split()) >= 8
    assert mutant.tests
    assert missing_tests(" ".join(mutant.tests)) == []
    assert {name.partition("/")[0] for name in mutant.changes} <= set(PRODUCT)


@needs_git
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_leaves_code_behind(mutant: Mutant, tree: Path) -> None:
    before = {name: (tree / name).read_bytes() for name in mutant.changes}
    try:
        assert apply(mutant, tree) is None, f'make mutants ARGS="--refresh {mutant.name}"'
        for name in mutant.changes:
            assert (tree / name).read_bytes() != before[name]
            if name.endswith(".py"):
                ast.parse((tree / name).read_text(), name)
    finally:
        for name, content in before.items():
            (tree / name).write_bytes(content)


@needs_git
def test_a_patch_that_does_not_apply_changes_nothing_and_is_told(tree: Path) -> None:
    diff = "--- a/Procfile\n+++ b/Procfile\n@@ -1,2 +1 @@\n no such line\n-nor this one\n"
    before = (tree / "Procfile").read_text()
    refused = apply(Mutant("00-nothing", "", diff), tree)
    assert refused is not None
    assert "Procfile" in refused
    assert (tree / "Procfile").read_text() == before


def test_words_choose_mutants_and_a_wrong_one_is_told() -> None:
    assert [mutant.name for mutant in chosen(["nowait"])] == ["16-nowait-in-later-batches"]
    assert chosen([]) == MUTANTS
    with pytest.raises(ValueError, match="no-such"):
        chosen(["nowait", "no-such"])


@needs_git
def test_a_source_folder_without_git_has_the_same_files(tree: Path) -> None:
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__" / "left.pyc").touch()
    without = project_files(tree)
    subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True, capture_output=True, timeout=60)
    try:
        assert project_files(tree) == without
    finally:
        shutil.rmtree(tree / ".git")
    assert {"Makefile", "shared/lua/admit.lua", "tests/unit/test_mutants.py"} <= set(without)
    assert not any("__pycache__" in name for name in without)


def test_a_difference_is_a_patch(tmp_path: Path) -> None:
    for folder, text in (("a", "one\ntwo\nthree\nfour\n"), ("b", "one\ntwo\nfour\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".gitignore").touch()
        (tmp_path / folder / "f").write_text(text)
    assert difference(tmp_path / "a", tmp_path / "b") == "--- a/f\n+++ b/f\n@@ -2,3 +2,2 @@\n two\n-three\n four\n"


def test_the_copy_is_what_every_process_imports(tree: Path, tmp_path: Path) -> None:
    # Elsewhere than in the copy, and as a script does it: what is installed would be found first.
    found = subprocess.run(
        [sys.executable, "-c", "import ops, producers, shared, workers as w; print(ops.__file__, w.__file__)"],
        cwd=tmp_path, env=environment(tree), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert found.stdout.split() == [str(tree / "ops/__init__.py"), str(tree / "workers/__init__.py")]


MADE_UP = """
import pytest

def test_green(): pass
def test_red(): assert 1 == 2
def test_wrong(): undefined
@pytest.fixture
def broken(): raise OSError("no server")
def test_without_its_server(broken): pass
@pytest.mark.parametrize("n", [1, 2])
def test_cases(n): assert n == 1
class TestIn:
    def test_red(self): assert "in a class" == ""
"""


def test_only_a_failure_in_the_test_itself_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # these need none, and loading them takes a while
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_made_up.py").write_text(MADE_UP)
    names = ["green", "red", "wrong", "without_its_server", "cases"]
    tests = [*(f"tests/test_made_up.py::test_{name}" for name in names), "tests/test_made_up.py::TestIn::test_red"]
    results = run_tests(tmp_path, tests, tmp_path / "scratch")
    assert [results[test].seen for test in tests] == [
        Seen.PASSED,
        Seen.FAILED,
        Seen.BROKEN,
        Seen.BROKEN,
        Seen.FAILED,
        Seen.FAILED,
    ]
    assert results[tests[1]].how == "assert 1 == 2"

    (tmp_path / "tests" / "test_made_up.py").write_text("import no_such_module\n")
    (result,) = run_tests(tmp_path, tests[:1], tmp_path / "again").values()
    assert (result.seen, "pytest ended with" in result.how) == (Seen.BROKEN, True)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (Seen.PASSED, Seen.FAILED, Verdict.CAUGHT),
        (Seen.PASSED, Seen.PASSED, Verdict.SURVIVED),
        (Seen.PASSED, Seen.BROKEN, Verdict.BROKEN),
        (Seen.FAILED, Seen.FAILED, Verdict.NOT_GREEN),
        (Seen.BROKEN, Seen.FAILED, Verdict.NOT_GREEN),
    ],
)
def test_a_mutant_is_caught_by_a_test_that_is_green_without_it(before: Seen, after: Seen, verdict: Verdict) -> None:
    mutant, test = MUTANTS[0], MUTANTS[0].tests[0]
    assert judge(mutant, test, {test: Result(before)}, {test: Result(after)}) == Row(mutant.name, test, verdict)
