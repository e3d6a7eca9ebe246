"""One floor that all fault tests of this folder share which hurt it and put it right again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.floor import Floor, open_floor

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def _floor(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Floor]:
    with open_floor(tmp_path_factory.mktemp("floor"), project_root / "Procfile") as opened:
        yield opened


@pytest.fixture
def floor(_floor: Floor) -> Iterator[Floor]:
    """The shared floor, everything on it running, before and after the test."""
    _floor.restore()
    yield _floor
    _floor.restore()


@pytest.fixture
def sku() -> str:
    """The name of an item that no other test uses."""
    return f"fault-{next(_numbers)}"
