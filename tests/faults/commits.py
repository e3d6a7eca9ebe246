"""Commits that take as long as a test wants: the process has sent its COMMIT, and Postgres is at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from tests.faults.floor import Floor
from tests.processes.process import session_members

#: An advisory lock of ours: commits wait while somebody holds it. Neither the sweep's nor another test's.
_LOCK = 4_711

# Not by waiting for the lock: `lock_timeout` would end that.
_FUNCTION = f"""
CREATE FUNCTION public.wait_in_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WHILE EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = 0 AND objid = {_LOCK}) LOOP
        PERFORM pg_sleep(0.02);
    END LOOP;
    RETURN NULL;
END $$
"""


class SlowCommits:
    """Transactions that move a purchase of one item to one status, and now wait in their commit."""

    def __init__(self, floor: Floor, connection: psycopg.Connection) -> None:
        self._floor = floor
        self._connection = connection

    def of(self, name: str) -> int | None:
        """The process, the one called `name` or a child of it, that waits for such a commit; None if there is none."""
        rows = self._floor.rows(
            "SELECT client_port FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query ILIKE 'commit%%'"
        )
        ports = {row["client_port"] for row in rows}
        for member in session_members(self._floor.processes[name].pid):
            if any(connection.laddr.port in ports for connection in member.net_connections("tcp")):
                return member.pid
        return None

    def go_on(self) -> None:
        """From now on nothing waits."""
        self._connection.execute("SELECT pg_advisory_unlock_all()")


@contextmanager
def slow_commits(floor: Floor, sku: str, status: str) -> Iterator[SlowCommits]:
    """Until `go_on`, whoever moves a purchase of this item to this status waits in the middle of its commit."""
    with psycopg.connect(floor.service.database_url, autocommit=True) as connection:
        connection.execute(_FUNCTION.encode())
        connection.execute(
            "CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT OR UPDATE ON fairlane.purchases"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
            f" WHEN (NEW.item = '{sku}' AND NEW.status = '{status}') EXECUTE FUNCTION public.wait_in_commit()".encode()
        )
        connection.execute(f"SELECT pg_advisory_lock({_LOCK})".encode())
        commits = SlowCommits(floor, connection)
        try:
            yield commits
        finally:
            commits.go_on()
            connection.execute("DROP TRIGGER slow_commit ON fairlane.purchases")
            connection.execute("DROP FUNCTION public.wait_in_commit")
