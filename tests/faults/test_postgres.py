"""Postgres stopped, killed, frozen and full, and its connections cut, while a sale runs.

Each fault hits a sale in its middle and lasts until it was felt. What was acknowledged is there afterwards, under the
id that was told; what was not is found out by the buyer's retry; nothing is sold or charged twice.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
import pytest

from shared.calling import CHARGES_CALL, Caller, lane_call, make_celery
from shared.routing import lane_of
from tests.faults.floor import Floor, open_floor
from tests.faults.sale import BOUND, felt, sale, until

#: Every commit that writes purchases takes a tenth of a second, and its session is named after the state it wrote.
SLOW_COMMITS = """
CREATE FUNCTION fairlane.linger() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('application_name') NOT LIKE 'commits %' THEN
        PERFORM set_config('application_name', 'commits ' || NEW.status, true);
        PERFORM pg_sleep(0.1);
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER linger AFTER INSERT OR UPDATE ON fairlane.purchases
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fairlane.linger();
"""
QUICK_COMMITS = "DROP TRIGGER linger ON fairlane.purchases; DROP FUNCTION fairlane.linger()"

#: Ends the sessions that are in COMMIT just now, and says what they were committing. (Chosen first: a condition beside
#: `pg_terminate_backend` may be looked at after it.)
END_COMMITS = """
WITH committing AS MATERIALIZED (
    SELECT pid, application_name FROM pg_stat_activity
    WHERE application_name LIKE 'commits %' AND state = 'active' AND upper(query) = 'COMMIT'
)
SELECT application_name FROM committing WHERE pg_terminate_backend(pid)
"""
END_ALL = """
WITH ours AS MATERIALIZED (SELECT pid FROM pg_stat_activity WHERE application_name = 'fairlane')
SELECT pid FROM ours WHERE pg_terminate_backend(pid)
"""
COUNT_ALL = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fairlane'"


@contextmanager
def watching(floor: Floor) -> Iterator[psycopg.Connection]:
    """A connection of the test's own, made before the fault."""
    with psycopg.connect(floor.service.database_url, autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_restarted(floor: Floor, sku: str, way: str) -> None:
    async with sale(floor, sku) as buyers:
        pid = floor.postgres.pid
        read_from = floor.postgres.log.stat().st_size
        await asyncio.to_thread(getattr(floor.postgres, way))
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(floor.service.database_url, connect_timeout=2)
        await felt(buyers, "503")
        await asyncio.to_thread(floor.postgres.start)
        assert floor.postgres.pid != pid
        said = floor.postgres.log.read_bytes()[read_from:].decode()
        assert ("automatic recovery in progress" in said) == (way == "kill"), said


async def test_all_connections_ended_again_and_again(floor: Floor, sku: str) -> None:
    ended = 0
    async with sale(floor, sku) as buyers:
        with watching(floor) as connection:
            for _ in range(10):
                accepted = len(buyers.accepted)
                ended += len(connection.execute(END_ALL).fetchall())
                await until(lambda accepted=accepted: len(buyers.accepted) >= accepted + 5, "a sale that goes on")  # type: ignore[misc]
    assert ended >= 10, ended


async def test_connections_ended_in_the_middle_of_their_commit(floor: Floor, sku: str) -> None:
    """An order, a decision, a claim and an outcome: the session of each is ended while it commits."""
    ended: Counter[str] = Counter()
    wanted = ("commits queued", "commits reserved", "commits charging", "commits confirmed")
    async with sale(floor, sku):
        with watching(floor) as connection:
            connection.execute(SLOW_COMMITS)
            try:
                deadline = time.monotonic() + BOUND
                while any(ended[what] < 2 for what in wanted):
                    assert time.monotonic() < deadline, ended
                    # A commit that is not looked at in its first half of a second succeeds: the sale goes on.
                    ended.update(name for (name,) in connection.execute(END_COMMITS))
                    await asyncio.sleep(0.25)
            finally:
                connection.execute(QUICK_COMMITS)


@contextmanager
def frozen(floor: Floor) -> Iterator[None]:
    """Postgres stands still, with all its sessions."""
    assert floor.postgres.pid is not None
    postmaster = psutil.Process(floor.postgres.pid)
    stopped = [postmaster]
    postmaster.send_signal(signal.SIGSTOP)  # first, so that it makes no new ones
    for session in postmaster.children(recursive=True):
        session.send_signal(signal.SIGSTOP)
        stopped.append(session)
    try:
        yield
        assert postmaster.status() == psutil.STATUS_STOPPED
    finally:
        for process in reversed(stopped):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def no_answer(floor: Floor, seconds: float) -> None:
    """Nobody gets a connection, for so long."""
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        psycopg.connect(floor.service.database_url, connect_timeout=max(2, math.ceil(seconds)))


@pytest.fixture(scope="module")
def impatient_floor(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Floor]:
    """Its processes wait for Postgres for seconds only, where the others wait for a quarter of a minute."""
    with open_floor(
        tmp_path_factory.mktemp("impatient"),
        project_root / "Procfile",
        FAIRLANE_STATEMENT_TIMEOUT="1.5",
        FAIRLANE_CONNECTION_TIMEOUT="2",
        FAIRLANE_DECIDE_LIMIT="4",
    ) as opened:
        yield opened


def claim_checks(floor: Floor, sku: str) -> None:
    """Work for the lane and the charges, as heard a moment ago."""
    with make_celery(floor.settings) as celery:
        Caller(floor.settings, celery).publish([lane_call(lane_of(sku, floor.settings.lanes)), CHARGES_CALL])


async def test_frozen_for_longer_than_every_timeout(impatient_floor: Floor, sku: str) -> None:
    floor = impatient_floor
    async with sale(floor, sku) as buyers:
        with frozen(floor):
            began = time.monotonic()
            # Nobody may have been about to be decided or paid just now.
            await asyncio.to_thread(claim_checks, floor, sku)
            await felt(buyers)

            def gave_up(name: str, sign: str) -> bool:
                return sign in floor.processes[name].logs_of_run()

            for name in ("web", "charges", "sweep"):
                await until(lambda name=name: gave_up(name, "postgres_does_not_answer"), f"{name} hangs up")  # type: ignore[misc]
            await until(lambda: gave_up("lanes", "TimeLimitExceeded"), "a stuck decision ended")
            # Connecting anew, which is given up after 5 s, must have been tried in vain as well.
            await asyncio.to_thread(no_answer, floor, began + 6 - time.monotonic())


def take_all(floor: Floor, taken: list[psycopg.Connection]) -> None:
    """Take connections until Postgres has none left for ordinary roles."""
    while True:
        try:
            taken.append(psycopg.connect(floor.service.database_url))
        except psycopg.OperationalError as error:
            if "remaining connection slots" in str(error) or "too many clients" in str(error):
                return
            raise


def take_those_of_the_service(floor: Floor, taken: list[psycopg.Connection], connection: psycopg.Connection) -> None:
    """End every connection of the service, and be quicker than it to take what became free."""
    deadline = time.monotonic() + BOUND
    take_all(floor, taken)
    while connection.execute(COUNT_ALL).fetchall() != [(0,)]:
        assert time.monotonic() < deadline, "the service keeps its connections"
        connection.execute(END_ALL)
        take_all(floor, taken)


async def test_out_of_connections(floor: Floor, sku: str) -> None:
    taken: list[psycopg.Connection] = []
    with watching(floor) as connection:
        try:
            take_all(floor, taken)
            for spare in [taken.pop() for _ in range(40)]:  # enough for the service and for looking on, for now
                spare.close()
            async with sale(floor, sku) as buyers:
                feeling = asyncio.create_task(felt(buyers, "503"))
                while not feeling.done():
                    # Again and again: a backend gives its place back a moment after it is no longer seen.
                    await asyncio.to_thread(take_those_of_the_service, floor, taken, connection)
                    await asyncio.wait([feeling], timeout=0.1)
                await feeling
                while taken:
                    taken.pop().close()
        finally:
            while taken:
                taken.pop().close()
