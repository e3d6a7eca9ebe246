"""Writing a patch anew that does not apply any more."""

from __future__ import annotations

import difflib
from pathlib import Path

from tests.mutants.patches import Mutant
from tests.mutants.trees import apply, copy_tree, project_files


def refresh(mutant: Mutant, folder: Path) -> None:
    """Write the mutant's diff anew, in copies of the tree under `folder`; asks for a hand where it must.

    Raises ValueError when nothing was changed in the copy.
    """
    before, after = copy_tree(folder / "a"), copy_tree(folder / "b")
    refused = apply(mutant, after)
    if refused is not None and mutant.diff and apply(mutant, after, context=0) is None:
        print(f"{mutant.name}: the lines around it changed. Look at the new patch.")
    elif refused is not None:
        print(f"{mutant.name}: {refused}\n\n{mutant.words}\n{mutant.diff}")
        input(f"Make this change in {after}, then press Enter. ")
    diff = difference(before, after)
    if not diff:
        raise ValueError("nothing was changed")
    mutant.file.write_text(mutant.words.rstrip() + "\n\n" + diff)
    print(f"wrote {mutant.file}")


def difference(before: Path, after: Path) -> str:
    """The diff between two copies, with one line of context: more would be outdated sooner."""
    diff: list[str] = []
    for name in project_files(before):
        old, new = before / name, after / name
        if old.read_bytes() != new.read_bytes():
            was, now = old.read_text().splitlines(keepends=True), new.read_text().splitlines(keepends=True)
            diff += difflib.unified_diff(was, now, f"a/{name}", f"b/{name}", n=1)
    return "".join(diff)
