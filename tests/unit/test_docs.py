"""What the documents point to is there: tests by name, files by link, and an answer to every claim of the article."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.named_tests import ROOT, TEST, missing_tests

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])

#: Inline links `[text](target)` and reference definitions `[name]: target`.
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)|^\[[^\]]+\]:\s+(\S+)", re.MULTILINE)

#: The claims of the article on Redis locks, as rows `| number | …`.
CLAIM = re.compile(r"^\| (\d+) \|(.+)\|$", re.MULTILINE)
CLAIMS = range(1, 39)


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def broken_links(text: str, folder: Path) -> list[str]:
    """The relative links of a text in this folder that lead to no file."""
    targets = [inline or reference for inline, reference in LINK.findall(without_code(text))]
    relative = [target for target in targets if not re.match(r"[a-z]+:|#", target)]
    return [target for target in relative if not (folder / target.partition("#")[0]).exists()]


def without_code(text: str) -> str:
    """Without blocks of code, where brackets are no links."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_test_that_is_named_exists(document: Path) -> None:
    assert missing_tests(document.read_text()) == []


def test_a_test_that_does_not_exist_is_noticed() -> None:
    crash = "tests/faults/test_crash_points.py::test_whoever_dies_there_loses_nothing"
    wrong = [
        "tests/unit/test_docs.py::test_of_another_name",
        "tests/unit/no_such_file.py::test_whatever",
        "tests/unit/test_docs.py::missing_tests",
        f"{crash}[decide.no_such_point]",
    ]
    right = ["tests/unit/test_docs.py::test_every_link_leads_somewhere", f"{crash}[decide.after_lock]"]
    assert missing_tests(", ".join(f"`{name}`" for name in [*wrong, *right])) == wrong


def test_the_documents_name_tests_at_all() -> None:
    for document in ("failures.md", "article.md"):
        assert len(TEST.findall((ROOT / "docs" / document).read_text())) >= 30, document


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(document: Path) -> None:
    assert broken_links(document.read_text(), document.parent) == []


def test_a_link_to_nowhere_is_noticed() -> None:
    text = "[a](README.md#x) [b](docs/nothing.md) [c](https://example.org) [d](#here)\n[e]: nowhere.md\n"
    assert broken_links(text, ROOT) == ["docs/nothing.md", "nowhere.md"]


def test_every_claim_of_the_article_is_answered_once_and_in_order() -> None:
    rows = CLAIM.findall((ROOT / "docs" / "article.md").read_text())
    assert [int(number) for number, _ in rows] == list(CLAIMS)
    for number, row in rows:
        cells = [cell.strip() for cell in row.split(" | ")]
        assert len(cells) == 3, f"claim {number}: what it says, the answer, what shows it"
        assert all(cells), f"claim {number} leaves something out"


def test_every_failure_says_all_five_things() -> None:
    rows = re.findall(r"^\| (.+) \|$", (ROOT / "docs" / "failures.md").read_text(), re.MULTILINE)
    faults = [row.split(" | ") for row in rows if "tests/" in row or "not shown yet" in row]
    assert len(faults) >= 60
    for fault in faults:
        assert len(fault) == 5, fault[0]
        assert all(cell.strip() for cell in fault), fault[0]
