"""`make mutants`: each safety line taken away in turn, and its test expected red."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from tests.mutants.judging import Row, Verdict, judge
from tests.mutants.patches import Mutant, chosen
from tests.mutants.refreshing import refresh
from tests.mutants.running import Result, Seen, run_tests
from tests.mutants.trees import GitMissingError, apply, copy_tree, copy_with_bytecode

#: Runs at once. Each has servers of its own and waits half of its time for their start and for its own locks.
_AT_ONCE = 2


def run_mutant(mutant: Mutant, before: Mapping[str, Result], tree: Path, scratch: Path) -> list[Row]:
    """Apply one mutant to a copy of its own and run its tests there."""
    try:
        copy = copy_with_bytecode(scratch / "tree", tree, mutant.changes)
        if refused := apply(mutant, copy):
            return [Row(mutant.name, test, Verdict.DID_NOT_APPLY, refused) for test in mutant.tests]
        green = [test for test in mutant.tests if before[test].seen is Seen.PASSED]
        after = run_tests(copy, green, scratch) if green else {}
        return [judge(mutant, test, before, after) for test in mutant.tests]
    finally:
        # Every run leaves two databases behind.
        shutil.rmtree(scratch, ignore_errors=True)


def run_all(mutants: Sequence[Mutant], folder: Path) -> list[Row]:
    """Run every mutant, telling of each as it ends."""
    tree = copy_tree(folder / "tree")
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    files = sorted({test.partition("::")[0] for test in tests})
    parts = [[test for test in tests if test.partition("::")[0] in files[n::_AT_ONCE]] for n in range(_AT_ONCE)]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        print(f"{len(tests)} tests without a mutant ...", flush=True)
        runs = [threads.submit(run_tests, tree, part, folder / f"0{n}") for n, part in enumerate(parts) if part]
        before = dict(chain.from_iterable(run.result().items() for run in runs))
        print(f"{len(mutants)} mutants ...", flush=True)
        rows: list[Row] = []
        work = [threads.submit(run_mutant, each, before, tree, folder / each.number) for each in mutants]
        try:
            for done in work:
                for row in done.result():
                    print(row, flush=True)
                    rows.append(row)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return rows


def main() -> int:
    """Exit code 0 if every mutant was caught by every test named for it, 1 if not, 2 for a word that is no mutant."""
    parser = argparse.ArgumentParser(prog="make mutants", description="Take each safety line away; its test must fail.")
    parser.add_argument("words", nargs="*", help="only mutants whose name contains one of these")
    parser.add_argument("--refresh", action="store_true", help="write the patches anew instead")
    given = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        mutants = chosen(given.words)
        # A short path, as servers have sockets in theirs.
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            if given.refresh:
                for mutant in mutants:
                    refresh(mutant, Path(folder) / mutant.name)
                return 0
            rows = run_all(mutants, Path(folder))
    except GitMissingError:
        parser.error("git applies the patches, and it is not installed")
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    missed = [row for row in rows if row.verdict is not Verdict.CAUGHT]
    seconds = time.monotonic() - began
    print(f"\n{len(mutants)} mutants, {len(rows) - len(missed)} of {len(rows)} caught, in {seconds:.0f} s")
    for row in missed:
        print(row)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
