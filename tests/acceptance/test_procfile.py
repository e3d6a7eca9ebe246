"""Each line of the Procfile alone: what it says when a setting is wrong, and how it ends when it is told to stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from ops.embedded import EmbeddedServers
from ops.embedded.ports import free_port
from tests.acceptance.service import SELLING, Service, eventually, running_service
from tests.acceptance.shop import Shop
from tests.processes.process import STOP_SECONDS, session_members, wait_for
from tests.processes.procfile import ProcfileStack

#: A process that cannot work ends as soon as it has imported what it needs. All of them start at once here.
REFUSED_WITHIN = 90.0
#: What a process started leaves with it; its own last steps take a moment.
EMPTY_WITHIN = 2.0


@dataclass(frozen=True)
class Wrong:
    """A line, and the setting that is missing (value None) or cannot work."""

    line: str
    setting: str
    value: str | None = None

    def __str__(self) -> str:
        return f"{self.line}-{self.setting}-{'missing' if self.value is None else 'wrong'}"


WRONG = [
    Wrong("release", "DATABASE_URL"),
    Wrong("web", "DATABASE_URL"),
    Wrong("web", "API_KEYS"),
    Wrong("web", "LANES", "8"),
    Wrong("lanes", "DATABASE_URL"),
    Wrong("lanes", "LANES", "8"),
    Wrong("charges", "PAYMENT_URL"),
    Wrong("charges", "PAYMENT_URL", "http://"),
    Wrong("charges", "GATEWAY", "nope"),
    Wrong("charges", "CHARGE_LOCK_TTL", "3"),
    Wrong("sweep", "DATABASE_URL"),
    Wrong("sweep", "LANES", "8"),
    Wrong("flower", "FLOWER_AUTH"),
    Wrong("flower", "FLOWER_PORT", "http"),
]


@dataclass(frozen=True)
class Ended:
    """How a process ended, and all it said."""

    code: int
    output: str


@pytest.fixture(scope="module")
def refused(
    service: Service, project_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[Wrong, Ended]]:
    """Every wrong start of WRONG, side by side, with the settings of a service that works but for the wrong one."""
    good = dict(service.environment) | {"FAIRLANE_PORT": "0", "FAIRLANE_FLOWER_PORT": str(free_port())}
    # Tests may run as root, of which Celery warns in several lines.
    good["PYTHONWARNINGS"] = "ignore:You're running the worker with superuser privileges"
    logs = tmp_path_factory.mktemp("refused")
    with ProcfileStack(project_root / "Procfile", env={}, logs=logs) as processes:
        for wrong in WRONG:
            settings = {name: value for name, value in good.items() if name != f"FAIRLANE_{wrong.setting}"}
            if wrong.value is not None:
                settings[f"FAIRLANE_{wrong.setting}"] = wrong.value
            processes.start(wrong.line, name=str(wrong), env=settings)
        yield {
            wrong: Ended(processes[str(wrong)].wait_exit(REFUSED_WITHIN), processes[str(wrong)].logs())
            for wrong in WRONG
        }


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_setting_that_cannot_work_is_one_line(refused: Mapping[Wrong, Ended], wrong: Wrong) -> None:
    ended = refused[wrong]
    assert ended.code > 0, ended
    (line,) = ended.output.splitlines()
    assert f"FAIRLANE_{wrong.setting}" in line


async def test_every_process_stops_when_told_and_finishes_what_it_began(
    servers: EmbeddedServers, project_root: Path, tmp_path: Path
) -> None:
    lines = (*SELLING, "flower")
    with running_service(servers, tmp_path, project_root / "Procfile", lines) as service:
        async with aiohttp.ClientSession() as session:
            shop = Shop(session, service.url)
            await shop.put_item("slow", stock=1)
            # The provider charges at once and tells so three seconds later.
            purchase_id = (await shop.buy("slow", token="tok_fault_slow")).body["id"]
            eventually(lambda: service.ledger(purchase_id), 15.0, "the call is under way")

        assert [row["status"] for row in service.purchases("slow")] == ["charging"]
        for line in lines:
            service.processes[line].terminate()
        for line in lines:
            process = service.processes[line]
            assert wait_for(lambda process=process: not process.alive, STOP_SECONDS), f"{line} did not end"  # type: ignore[misc]
            assert wait_for(lambda process=process: not session_members(process.pid), EMPTY_WITHIN), (  # type: ignore[misc]
                f"{line} left {session_members(process.pid)}"
            )
        codes = {line: service.processes[line].kill() for line in lines}
        assert codes == dict.fromkeys(lines, 0)
        assert "Traceback" not in "".join(service.processes[line].logs() for line in lines)

        assert [row["status"] for row in service.purchases("slow")] == ["confirmed"], "the outcome was recorded"
        assert len(service.ledger(purchase_id)) == 1
