"""Running Postgres when the current user is root, which Postgres refuses to be.

The server then runs as the user *nobody*, by number; no user is created. Two things stand in the way, and
neither is solved by opening folders to others:

*The binaries* may lie under a folder that only root may enter (a virtualenv below /root). They are tried as
that user. Only if that fails they are copied, once per version, to a folder in the system's temporary
folder that root owns and nobody else can write. A folder there that is not exactly so is not used: somebody
else may have laid it out.

*The data* stays where it was asked for, even below /root. The server is spawned inside its data folder and
is told that its data is in `/proc/self/cwd`. The kernel follows that link to the folder itself, so only the
folder has to belong to the server's user, and the folders above it stay shut. Where there is no /proc
(macOS), the plain path is used and must be reachable.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from ops.embedded.errors import EmbeddedError
from ops.embedded.launch import Account, server_environment

NOBODY = Account(uid=65534, gid=65534)  # The kernel's overflow ids: the same on every Linux distribution.
_PROBE_WITHIN = 30.0  # Seconds: printing a version takes milliseconds, save on a machine that swaps.
_LEFT_OUT = shutil.ignore_patterns("include", "doc", "__pycache__", "*.a", "*.py")


def account_for(data: Path) -> Account | None:
    """Return the user to run as: None when not root, else the owner of existing data, else nobody.

    Data that a user made and root then serves must stay usable for that user.
    """
    if os.geteuid() != 0:
        return None
    if data.exists():
        found = data.stat()
        if found.st_uid != 0:
            return Account(found.st_uid, found.st_gid)
    return NOBODY


def named_from_inside(data: Path, account: Account | None) -> str:
    """Return what to call `data` to a process that is spawned inside it as `account`."""
    inside = Path("/proc/self/cwd")
    return str(inside) if account is not None and inside.exists() else str(data)


def usable_package(package: Path, version: str, account: Account | None) -> Path:
    """Return a folder equal to `package`, with its libraries beside it, that `account` can run.

    Raises EmbeddedError when there is no place for a copy.
    """
    if account is None or _runs(package, account):
        return package
    reasons: list[str] = []
    for parent in dict.fromkeys([tempfile.gettempdir(), "/var/tmp", "/tmp"]):  # noqa: S108 - the copy is checked for its owner
        place = Path(parent) / f"fairlane-postgres-{version}-{os.geteuid()}"
        try:
            _ensure_copy(package, place)
        except (OSError, shutil.Error, EmbeddedError) as error:
            reasons.append(f"{place}: {error}")
            continue
        if _runs(place / package.name, account):
            return place / package.name
        reasons.append(f"{place}: cannot be run from by user {account.uid}")
    raise EmbeddedError("no place for binaries that an unprivileged user can run; " + "; ".join(reasons))


def _runs(package: Path, account: Account) -> bool:
    install = package / "pginstall"
    script = '"$1/bin/postgres" --version && "$1/bin/initdb" --version && test -r "$1/share/postgres.bki"'
    probe = subprocess.run(
        ["/bin/sh", "-c", script, "sh", str(install)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd="/",
        env=server_environment(),
        user=account.uid,
        group=account.gid,
        extra_groups=[],
        timeout=_PROBE_WITHIN,
        check=False,
    )
    return probe.returncode == 0


def _ensure_copy(package: Path, place: Path) -> None:
    if os.path.lexists(place):
        _check_ours(place)
        if _complete(package, place):
            return
    draft = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
    try:
        for source in _sources(package):
            shutil.copytree(source, draft / source.name, ignore=_LEFT_OUT)
        _open_for_reading(draft)
        if place.exists():  # Thinned out by a cleaner of temporary folders.
            aside = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
            place.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        try:
            draft.rename(place)
        except OSError:  # Another process was first: its copy is as good as ours, if it is root's.
            _check_ours(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sources(package: Path) -> list[Path]:
    """The package and the libraries that its binaries look for beside it."""
    libraries = package.with_name(package.name + ".libs")
    return [package, libraries] if libraries.exists() else [package]


def _check_ours(place: Path) -> None:
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise EmbeddedError("exists and is not a folder that only root can write; remove it")


def _complete(package: Path, place: Path) -> bool:
    for source in _sources(package):
        for folder, names, files in os.walk(source):
            left_out = _LEFT_OUT(folder, [*names, *files])
            names[:] = [name for name in names if name not in left_out]
            for file in files:
                original = Path(folder, file)
                copy = place / original.relative_to(package.parent)
                if file in left_out:
                    continue
                if not copy.is_file() or copy.stat().st_size != original.stat().st_size:
                    return False
    return True


def _open_for_reading(draft: Path) -> None:
    """Let everybody read and run the copy, whatever the umask was, and only root write it."""
    draft.chmod(0o755)
    for folder, names, files in os.walk(draft):
        for name in names:
            Path(folder, name).chmod(0o755)
        for name in files:
            file = Path(folder, name)
            file.chmod(0o755 if file.stat().st_mode & 0o100 else 0o644)
