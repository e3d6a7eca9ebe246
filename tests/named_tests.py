"""Tests that are named in a text: by the documents, as what shows a claim; by the mutants, as what catches them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from shared.crash_points import POINTS

ROOT = Path(__file__).parents[1]

#: `tests/….py::[Class::]test_…`, and in brackets the one case of a parametrized test that is meant.
TEST = re.compile(r"(?P<file>tests/[\w/.-]+)::(?P<name>[\w:]+)(?:\[(?P<case>[^\]]+)\])?")

#: Tests whose cases are named by crash points.
BY_CRASH_POINT = {"test_whoever_dies_there_loses_nothing"}


@cache
def defined_in(file: Path) -> frozenset[str]:
    """Every test function of a file, those of a class as `Class::test_…`."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        inner, prefix = (node.body, f"{node.name}::") if isinstance(node, ast.ClassDef) else ([node], "")
        functions = [each for each in inner if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
        found |= {prefix + function.name for function in functions if function.name.startswith("test_")}
    return frozenset(found)


def missing_tests(text: str) -> list[str]:
    """The tests a text names that do not exist."""
    missing = []
    for named in TEST.finditer(text):
        file, name, case = ROOT / named["file"], named["name"], named["case"]
        there = file.is_file() and name in defined_in(file)
        if case is not None:
            there = there and name in BY_CRASH_POINT and case in POINTS
        if not there:
            missing.append(named[0])
    return missing
