"""The `fairlane` command as a user runs it: exit codes, one line per error, and what it does to the database."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis
from typer.testing import CliRunner, Result

from ops.cli import app
from ops.embedded.ports import free_port
from ops.migrating import migrate_when_reachable
from ops.sandbox import ProviderProcess
from shared.errors import UnavailableError
from shared.routing import lane_of
from shared.settings import Settings
from tests.processes.process import OwnedProcess, child_environment, session_members, wait_for

FAIRLANE = str(Path(sys.executable).with_name("fairlane"))

HEADER = "sku,name,stock,price,currency\n"

#: A command that only starts Python and a database connection; a loaded machine may need twenty times as long.
COMMAND_WITHIN = 60


def fairlane(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
    """The command, within this process: starting Python again for each would take most of the tests' time."""
    return CliRunner().invoke(app, arguments, env=env or {}, prog_name="fairlane")


def fairlane_process(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command as it is installed."""
    return subprocess.run(
        [FAIRLANE, *arguments],
        env=child_environment(env),
        capture_output=True,
        text=True,
        timeout=COMMAND_WITHIN,
        check=False,
    )


def is_one_line(text: str, *words: str) -> bool:
    return len(text.splitlines()) == 1 and text.startswith("fairlane: ") and all(word in text for word in words)


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path_factory.mktemp("provider"), latency=0) as running:
        yield running


@pytest.fixture
def database(environment: dict[str, str]) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(environment["FAIRLANE_DATABASE_URL"], autocommit=True) as connection:
        yield connection


def skus(database: psycopg.Connection[Any]) -> dict[str, int]:
    return dict(database.execute("SELECT sku, stock FROM fairlane.items ORDER BY sku").fetchall())


def test_help_names_every_command() -> None:
    shown = fairlane_process("--help")
    assert shown.returncode == 0
    for command in ("migrate", "up", "dev", "demo", "audit", "items", "review"):
        assert f"\n  {command} " in shown.stdout


@pytest.mark.parametrize("arguments", [("sell",), ("audit", "--xml"), ("items", "import"), ("demo", "--buyers", "0")])
def test_wrong_usage_is_exit_2(arguments: tuple[str, ...]) -> None:
    assert fairlane(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("migrate",), "FAIRLANE_DATABASE_URL"),
        (("migrate",), "FAIRLANE_REDIS_URL"),
        (("audit",), "FAIRLANE_PAYMENT_URL"),
        (("review", "list"), "FAIRLANE_PAYMENT_URL"),
        (("items", "import", "x.csv"), "FAIRLANE_DATABASE_URL"),
        (("up",), "FAIRLANE_API_KEYS"),
        (("up",), "FAIRLANE_PAYMENT_URL"),
        (("up",), "FAIRLANE_FLOWER_AUTH"),
    ],
)
def test_a_missing_setting_is_named_in_one_line(
    environment: dict[str, str], arguments: tuple[str, ...], missing: str
) -> None:
    env = environment | {"FAIRLANE_FLOWER_AUTH": "user:password"}
    del env[missing]
    ended = fairlane(*arguments, env=env)
    assert ended.exit_code == 2
    assert is_one_line(ended.stderr, missing, "is not set"), ended.stderr
    assert ended.stdout == ""


class TestMigrate:
    def test_it_says_the_revision_and_may_be_repeated(self, environment: dict[str, str]) -> None:
        for _ in range(2):
            ended = fairlane("migrate", env=environment)
            assert (ended.exit_code, ended.stderr) == (0, "")
            assert "revision 0" in ended.stdout

    def test_another_number_of_lanes(self, environment: dict[str, str]) -> None:
        ended = fairlane("migrate", env=environment | {"FAIRLANE_LANES": "8"})
        assert ended.exit_code == 2
        assert is_one_line(ended.stderr, "FAIRLANE_LANES", "16")

    def test_a_database_that_does_not_exist(self, environment: dict[str, str]) -> None:
        url = environment["FAIRLANE_DATABASE_URL"].rpartition("/")[0] + "/nowhere"
        ended = fairlane("migrate", env=environment | {"FAIRLANE_DATABASE_URL": url})
        assert ended.exit_code == 2
        assert is_one_line(ended.stderr, "FAIRLANE_DATABASE_URL", "does not exist"), ended.stderr

    def test_a_server_that_is_not_there_is_waited_for(self, environment: dict[str, str]) -> None:
        url = f"postgresql://fairlane@127.0.0.1:{free_port()}/fairlane"
        settings = Settings.model_validate({"database_url": url, "redis_url": environment["FAIRLANE_REDIS_URL"]})
        with pytest.raises(UnavailableError, match="FAIRLANE_DATABASE_URL: no connection to Postgres"):
            migrate_when_reachable(settings, wait=0)


class TestItemsImport:
    def test_creates_and_changes_items(
        self, environment: dict[str, str], database: psycopg.Connection[Any], tmp_path: Path
    ) -> None:
        file = tmp_path / "items.csv"
        file.write_text(HEADER + "b,B,2,100,EUR\na,A,1,100,EUR\n")
        assert fairlane("items", "import", str(file), env=environment).stdout == (
            "fairlane: 2 items created, 0 changed\n"
        )
        file.write_text(HEADER + "a,A,5,100,EUR\nc,C,3,100,EUR\n")
        assert fairlane("items", "import", str(file), env=environment).stdout == (
            "fairlane: 1 items created, 1 changed\n"
        )
        assert skus(database) == {"a": 5, "b": 2, "c": 3}

    def test_a_raised_stock_calls_its_lane(
        self, environment: dict[str, str], database: psycopg.Connection[Any], tmp_path: Path
    ) -> None:
        file = tmp_path / "items.csv"
        file.write_text(HEADER + "a,A,0,100,EUR\n")
        fairlane("items", "import", str(file), env=environment)
        (lane,) = database.execute("SELECT lane FROM fairlane.items").fetchone() or (None,)
        with Redis.from_url(environment["FAIRLANE_REDIS_URL"], decode_responses=True) as redis:
            assert redis.llen(f"lane.{lane:02d}") == 0
            file.write_text(HEADER + "a,A,1,100,EUR\n")
            fairlane("items", "import", str(file), env=environment)
            assert redis.llen(f"lane.{lane:02d}") == 1

    def test_one_bad_line_and_nothing_is_imported(
        self, environment: dict[str, str], database: psycopg.Connection[Any], tmp_path: Path
    ) -> None:
        file = tmp_path / "items.csv"
        file.write_text(HEADER + "a,A,1,100,EUR\nb,B,-1,100,EUR\nc,C,1,x,euro\n")
        ended = fairlane("items", "import", str(file), env=environment)
        assert ended.exit_code == 1
        lines = ended.stderr.splitlines()
        assert [line.removeprefix(f"{file}: ").split(":")[0] for line in lines[:3]] == [
            "line 3, stock",
            "line 4, price",
            "line 4, currency",
        ]
        assert lines[3].endswith("nothing imported, 3 errors")
        assert skus(database) == {}

    def test_a_stock_below_what_is_held(
        self, environment: dict[str, str], database: psycopg.Connection[Any], tmp_path: Path
    ) -> None:
        file = tmp_path / "items.csv"
        file.write_text(HEADER + "a,A,5,100,EUR\n")
        fairlane("items", "import", str(file), env=environment)
        database.execute("UPDATE fairlane.items SET available = 1, unpaid = 4")
        file.write_text(HEADER + "z,Z,1,1,EUR\na,A,3,100,EUR\n")
        ended = fairlane("items", "import", str(file), env=environment)
        assert ended.exit_code == 1
        assert "line 3, stock: stock 3 is below the 4 units" in ended.stderr
        assert skus(database) == {"a": 5}

    def test_a_file_that_is_not_there(self, environment: dict[str, str]) -> None:
        ended = fairlane("items", "import", "nothing.csv", env=environment)
        assert ended.exit_code == 2
        assert is_one_line(ended.stderr, "nothing.csv", "No such file")


class TestAudit:
    def test_in_order(self, environment: dict[str, str], provider: ProviderProcess) -> None:
        ended = fairlane("audit", env=environment | {"FAIRLANE_PAYMENT_URL": provider.url})
        assert (ended.exit_code, ended.stderr) == (0, "")
        assert "agree" in ended.stdout

    def test_drift_is_exit_1_and_names_the_item(
        self, environment: dict[str, str], database: psycopg.Connection[Any], provider: ProviderProcess, tmp_path: Path
    ) -> None:
        env = environment | {"FAIRLANE_PAYMENT_URL": provider.url}
        file = tmp_path / "items.csv"
        file.write_text(HEADER + "crooked-lamp,Lamp,5,100,EUR\n")
        fairlane("items", "import", str(file), env=env)
        database.execute("UPDATE fairlane.items SET available = 4")
        ended = fairlane("audit", env=env)
        assert ended.exit_code == 1
        assert "crooked-lamp" in ended.stdout
        told = fairlane("audit", "--json", env=env)
        assert told.exit_code == 1
        report = json.loads(told.stdout)
        assert not report["ok"]
        assert [(finding["check"], finding["subject"]) for finding in report["findings"]] == [
            ("sold stock", "crooked-lamp")
        ]


PROCFILE = """\
release: {release}
steady: sh -c 'echo steady says $WORD; trap "echo steady was asked; exit 0" TERM; sleep 1000 & wait'
stubborn: sh -c 'trap "" TERM; echo stubborn is up; sleep 1000; sleep 1000'
brief: {brief}
"""


class TestStack:
    """The process stack, on lines of its own: how it starts, prefixes, stops and leaves nothing behind."""

    def start(self, directory: Path, *, release: str = "true", brief: str = "sleep 1000") -> OwnedProcess:
        (directory / "Procfile").write_text(PROCFILE.format(release=release, brief=brief))
        program = (
            "import os, sys, ops.stack as stack\n"
            "from pathlib import Path\n"
            "stack.STOP_WITHIN = 1.0\n"
            "stack.__file__ = str(Path.cwd() / 'ops' / 'stack.py')\n"
            "sys.exit(stack.up(os.environ))\n"
        )
        root = str(Path(__file__).parents[2])
        return OwnedProcess(
            [sys.executable, "-c", program],
            log=directory / "stack.log",
            env={"WORD": "hello", "PYTHONPATH": root},
            cwd=directory,
            name="stack",
        )

    def lines_of(self, process: OwnedProcess) -> list[int]:
        words = [line for line in process.logs_of_run().splitlines() if "started (pid" in line]
        return [int(line.rpartition("pid ")[2].rstrip(")")) for line in words]

    def left_behind(self, process: OwnedProcess) -> list[int]:
        return [member.pid for pid in self.lines_of(process) for member in session_members(pid)]

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_stops_every_line_and_what_ignores_it_is_killed(
        self, tmp_path: Path, number: int, code: int
    ) -> None:
        with self.start(tmp_path) as process:
            process.wait_ready(lambda: "stubborn is up" in process.logs() and "hello" in process.logs())
            assert "steady   | steady says hello" in process.logs()
            process.send_signal(number)
            assert wait_for(lambda: not process.alive, 30)
            assert process.kill() == code
            assert "steady was asked" in process.logs()
            assert self.left_behind(process) == []

    def test_one_line_that_ends_ends_all(self, tmp_path: Path) -> None:
        with self.start(tmp_path, brief="sh -c 'sleep 0.3; exit 7'") as process:
            assert process.wait_exit(30) == 7
            assert self.left_behind(process) == []

    def test_a_line_that_ends_without_an_error_is_an_error(self, tmp_path: Path) -> None:
        with self.start(tmp_path, brief="true") as process:
            assert process.wait_exit(30) == 1

    def test_without_a_release_nothing_starts(self, tmp_path: Path) -> None:
        with self.start(tmp_path, release="sh -c 'echo no; exit 3'") as process:
            assert process.wait_exit(30) == 3
            assert "steady" not in process.logs().replace("steady   |", "")

    def test_a_starter_that_is_killed_takes_its_lines_with_it(self, tmp_path: Path) -> None:
        with self.start(tmp_path) as process:
            process.wait_ready(lambda: "stubborn is up" in process.logs() and "hello" in process.logs())
            os.kill(process.pid, signal.SIGKILL)
            assert wait_for(lambda: self.left_behind(process) == [], 30)


def test_an_error_of_the_installed_command_is_one_line() -> None:
    ended = fairlane_process("audit")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert is_one_line(ended.stderr, "FAIRLANE_DATABASE_URL", "is not set"), ended.stderr


def test_a_second_dev_in_one_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".fairlane").mkdir()
    with (tmp_path / ".fairlane" / "dev.lock").open("w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = fairlane("dev")
    assert ended.exit_code == 2
    assert is_one_line(ended.stderr, "another `fairlane dev`", "4711"), ended.stderr


class TestReview:
    @pytest.fixture
    def aside(self, environment: dict[str, str], database: psycopg.Connection[Any]) -> str:
        """A purchase that was set aside before its decision."""
        database.execute(
            "INSERT INTO fairlane.items (sku, lane, name, price, currency, stock, available, hold_seconds)"
            " VALUES ('cup', %s, 'Cup', 100, 'EUR', 1, 1, 900)",
            (lane_of("cup", 16),),
        )
        (purchase,) = database.execute(
            "INSERT INTO fairlane.purchases (id, seq, client_id, idempotency_key, item, lane, quantity,"
            " customer, payment_token, amount, currency, status, reason)"
            " VALUES (gen_random_uuid(), nextval('fairlane.purchase_seq'), 'shop', 'k', 'cup', %s, 1, 'c-1', 'tok',"
            " 100, 'EUR', 'needs_review', 'undecidable') RETURNING replace(id::text, '-', '')",
            (lane_of("cup", 16),),
        ).fetchone() or ("",)
        return str(purchase)

    def test_it_is_listed_and_declined(
        self, environment: dict[str, str], provider: ProviderProcess, aside: str
    ) -> None:
        env = environment | {"FAIRLANE_PAYMENT_URL": provider.url}
        listed = fairlane("review", "list", env=env)
        assert listed.exit_code == 0
        assert aside in listed.stdout
        assert "at the provider: nothing" in listed.stdout
        declined = fairlane("review", "decline", aside, env=env)
        assert (declined.exit_code, declined.stdout) == (0, f"fairlane: {aside} is declined\n")
        assert fairlane("review", "list", env=env).stdout == "fairlane: 0 in review\n"
        assert fairlane("audit", env=env).exit_code == 0

    def test_what_the_provider_does_not_know_is_not_confirmed(
        self, environment: dict[str, str], provider: ProviderProcess, aside: str
    ) -> None:
        refused = fairlane("review", "confirm", aside, "ch_1", env=environment | {"FAIRLANE_PAYMENT_URL": provider.url})
        assert refused.exit_code == 2
        assert is_one_line(refused.stderr, aside, "no succeeded charge")

    def test_what_is_no_id_is_named(self, environment: dict[str, str], provider: ProviderProcess) -> None:
        refused = fairlane("review", "decline", "x'1", env=environment | {"FAIRLANE_PAYMENT_URL": provider.url})
        assert refused.exit_code == 2
        assert is_one_line(refused.stderr, "x'1 is not the id of a purchase")
