"""What is started, as whom and with which environment."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from ops.embedded.errors import EmbeddedNotInstalled


@dataclass(frozen=True)
class Account:
    """The user a server runs as: numeric ids, without further groups."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Launch:
    """How to spawn a server. `account` None: as the current user."""

    arguments: list[str]
    cwd: Path
    account: Account | None = None


def package_folder(package: str) -> Path:
    """Return the folder of an installed package, without importing it, or raise EmbeddedNotInstalled."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EmbeddedNotInstalled
    return Path(spec.origin).resolve().parent


def server_environment() -> dict[str, str]:
    """Return the environment of a server: few variables, so that no PG* setting and no secret gets in."""
    kept = {key: value for key in ("PATH", "LD_LIBRARY_PATH") if (value := os.environ.get(key)) is not None}
    return {"PATH": os.defpath, **kept, "LC_ALL": "C"}
