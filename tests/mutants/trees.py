"""Copies of the project: the files that belong to it, as they stand now, committed or not."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from tests.mutants.patches import Mutant

ROOT = Path(__file__).parents[2]


class GitMissingError(Exception):
    """`git` is not installed; it applies the patches."""


def copy_tree(target: Path, source: Path = ROOT) -> Path:
    """Copy the project's files to `target`, a folder that does not exist yet; returns it."""
    for name in project_files(source):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, place)
    return target


def project_files(source: Path) -> list[str]:
    """What git tracks or would track; where there is no repository, everything that `.gitignore` does not name."""
    if (source / ".git").exists() and shutil.which("git"):
        listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=source)
        listed.check_returncode()
        # What was deleted and not committed is still listed.
        return sorted({name for name in listed.stdout.split("\0") if name and (source / name).is_file()})
    # Ours holds plain names and endings only, so no more of git's rules is needed.
    ignored = [line.rstrip("/") for line in (source / ".gitignore").read_text().split() if not line.startswith("#")]
    ignored.append(".git")
    found: list[str] = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in ignored)]
        kept = [name for name in names if not any(fnmatch(name, pattern) for pattern in ignored)]
        found += [(Path(folder) / name).relative_to(source).as_posix() for name in kept]
    return sorted(found)


def copy_with_bytecode(target: Path, tree: Path, changes: Iterable[str]) -> Path:
    """A copy of a copy in which tests ran, with what Python compiled there, but not of the folders of these files."""
    shutil.copytree(tree, target)
    for name in changes:
        # A file that is patched within the second in which it was made would be taken for what was compiled.
        shutil.rmtree((target / name).parent / "__pycache__", ignore_errors=True)
    return target


def apply(mutant: Mutant, tree: Path, *, context: int = 1) -> str | None:
    """Apply a patch to a copy of the tree: None, or in git's words why it does not apply; then nothing was changed.

    `context` is how many of the lines around a change must be found again.
    """
    if not mutant.diff:
        return "it has no diff yet"
    applied = _git("apply", f"-C{context}", "--whitespace=nowarn", "-", folder=tree, given=mutant.diff)
    return None if applied.returncode == 0 else applied.stderr.strip()


def _git(*arguments: str, folder: Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run git without anybody's settings. In a copy, a repository further up is none of ours: paths would be its."""
    ours = {"GIT_CEILING_DIRECTORIES": str(folder.parent), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    if shutil.which("git") is None:
        raise GitMissingError
    return subprocess.run(
        ["git", *arguments], cwd=folder, env=os.environ | ours, input=given, capture_output=True, text=True, check=False
    )
