"""What became of a mutant, judged by the same test with it and without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tests.mutants.patches import Mutant
from tests.mutants.running import Result, Seen


class Verdict(StrEnum):
    """What became of a mutant under one of its tests."""

    CAUGHT = "caught"  #: the test failed
    SURVIVED = "SURVIVED"  #: the test passed: nothing would notice if the line were gone
    DID_NOT_APPLY = "DID NOT APPLY"  #: the line is not where the patch looks for it: refresh it
    NOT_GREEN = "NOT GREEN WITHOUT IT"  #: the test fails without the mutant as well, and shows nothing
    BROKEN = "BROKEN"  #: the test could not be run on the mutant: the patch must be mended


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    mutant: str
    test: str
    verdict: Verdict
    how: str = ""

    def __str__(self) -> str:
        how = f"\n{'':10}{self.how[:150]}" if self.how else ""
        return f"{self.verdict:<9} {self.mutant}\n{'':10}{self.test}{how}"


def judge(mutant: Mutant, test: str, before: Mapping[str, Result], after: Mapping[str, Result]) -> Row:
    """What a mutant's run says, given the same tests' run without it."""
    if before[test].seen is not Seen.PASSED:
        return Row(mutant.name, test, Verdict.NOT_GREEN, before[test].how)
    verdict = {Seen.FAILED: Verdict.CAUGHT, Seen.PASSED: Verdict.SURVIVED, Seen.BROKEN: Verdict.BROKEN}
    return Row(mutant.name, test, verdict[after[test].seen], after[test].how)
