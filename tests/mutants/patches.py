"""The patches as they lie in this folder: what each takes away, why that must be missed, and by which test."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.named_tests import TEST

FOLDER = Path(__file__).parent

#: Where the words of a patch end and its diff begins.
_DIFF = re.compile(r"^--- ", re.MULTILINE)
_CAUGHT_BY = re.compile(r"^Caught-by: (.+)$", re.MULTILINE)
_CHANGED = re.compile(r"^(?:---|\+\+\+) [ab]/(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One patch. `name` is its file's name without the ending."""

    name: str
    words: str
    diff: str

    @classmethod
    def read(cls, file: Path) -> Mutant:
        """The mutant in this file; without a diff if there is none yet."""
        text = file.read_text()
        begins = _DIFF.search(text)
        at = begins.start() if begins else len(text)
        return cls(file.stem, text[:at], text[at:])

    @property
    def number(self) -> str:
        """What its name begins with: two digits or three."""
        return self.name.partition("-")[0]

    @property
    def file(self) -> Path:
        """Where it lies."""
        return FOLDER / f"{self.name}.patch"

    @property
    def promise(self) -> str:
        """What the line keeps, and what breaks without it."""
        return " ".join(_CAUGHT_BY.sub("", self.words).split())

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests that must fail, as pytest names them."""
        return tuple(named[0] for line in _CAUGHT_BY.findall(self.words) for named in TEST.finditer(line))

    @property
    def changes(self) -> frozenset[str]:
        """The files it changes, from the project's root."""
        return frozenset(_CHANGED.findall(self.diff))


def all_mutants() -> list[Mutant]:
    """Every mutant, in order of its number."""
    return [Mutant.read(file) for file in sorted(FOLDER.glob("*.patch"))]


def chosen(words: Iterable[str]) -> list[Mutant]:
    """The mutants whose name contains one of these words; all of them if there is no word.

    Raises ValueError for a word that is in no name.
    """
    mutants, wanted = all_mutants(), list(words)
    for word in wanted:
        if not any(word in mutant.name for mutant in mutants):
            raise ValueError(f"no mutant is called {word!r}")
    return [mutant for mutant in mutants if not wanted or any(word in mutant.name for word in wanted)]
