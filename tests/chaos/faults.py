"""How each kind of fault is done, and how it is seen that it was felt.

A fault runs in a thread of its own from its beginning to its end, with its target in its hands. It returns what shows
that it fired (an exit code, connections broken, replies swallowed …), or None: then it did not, as when Redis was to be
flushed and was empty. Only faults that fired are counted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import psutil
import psycopg
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.chaos.schedule import Event
from tests.chaos.stage import Stage, children
from tests.processes.process import wait_for
from tests.processes.proxy import Proxy

#: SIGSTOP and SIGKILL need no help from the process.
_SIGNALLED_WITHIN = 5.0
#: A stopped worker first ends its calls, which take up to 1.5 s here, and closes its connections.
_STOPPED_WITHIN = 15.0
#: Redis answers in a millisecond; a paused one does not.
_ASK_REDIS_WITHIN = 0.5

Fault = Callable[[Stage, Event], str | None]


def killed(stage: Stage, event: Event) -> str | None:
    process = stage.process(event.target)
    if not process.alive:
        return None
    code = process.kill()
    stage.last(event)
    process.start()
    return f"exit code {code}" if code == -signal.SIGKILL else None


def stopped(stage: Stage, event: Event) -> str | None:
    """Asked to end, as at every deployment."""
    process = stage.process(event.target)
    if not process.alive:
        return None
    process.terminate()
    by_itself = wait_for(lambda: not process.alive, _STOPPED_WITHIN)
    code = process.kill()
    stage.last(event)
    process.start()
    return f"exit code {code}" if by_itself else f"did not end within {_STOPPED_WITHIN:g} s, exit code {code}"


def frozen(stage: Stage, event: Event) -> str | None:
    process = stage.process(event.target)
    if not process.alive:
        return None
    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return _stand_still(stage, event, members)


def child_killed(stage: Stage, event: Event) -> str | None:
    pool = children(stage.process(event.target))
    if not pool:
        return None
    child = pool[event.draw % len(pool)]
    child.kill()
    return f"pool process {child.pid}" if wait_for(lambda: not _lives(child), _SIGNALLED_WITHIN) else None


def child_frozen(stage: Stage, event: Event) -> str | None:
    pool = children(stage.process(event.target))
    return _stand_still(stage, event, [pool[event.draw % len(pool)]]) if pool else None


def server_frozen(stage: Stage, event: Event) -> str | None:
    return _stand_still(stage, event, stage.members(event.target))


def redis_killed(stage: Stage, event: Event) -> str | None:
    return _redis_killed(stage, event)


def redis_log_cut(stage: Stage, event: Event) -> str | None:
    """Up to the last third of the append-only log is gone, down to the middle of a command."""
    cut = 0

    def cut_the_tail() -> None:
        nonlocal cut
        folder = stage.floor.valkey.log.parent / "data" / "appendonlydir"
        path = max(folder.glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))
        content = path.read_bytes()
        keep = len(content) * (67 + event.draw % 33) // 100
        command = content.rfind(b"\r\n*", 0, keep)
        if command > 0:
            os.truncate(path, command + 5)
            cut = len(content) - command - 5

    seen = _redis_killed(stage, event, cut_the_tail)
    return f"{seen}, {cut} bytes lost" if seen and cut else None


def _redis_killed(stage: Stage, event: Event, meanwhile: Callable[[], None] = lambda: None) -> str | None:
    valkey = stage.floor.valkey
    before = valkey.pid
    valkey.kill()
    meanwhile()
    stage.last(event)
    valkey.start()
    return f"{before} is now {valkey.pid}" if before not in (None, valkey.pid) else None


def redis_flushed(stage: Stage, event: Event) -> str | None:
    with _redis(stage) as client:
        keys = int(client.dbsize())
        client.flushall()
    return f"{keys} keys" if keys else None


def redis_paused(stage: Stage, event: Event) -> str | None:
    """It takes commands and answers none, by itself."""
    with _redis(stage) as client:
        client.client_pause(max(1, int(event.seconds * 1000)), all=True)
    with _redis(stage, within=min(_ASK_REDIS_WITHIN, event.seconds / 2)) as client:
        try:
            client.ping()
            seen = ""
        except RedisError as error:
            seen = f"{type(error).__name__} within the pause"
    stage.last(event)
    return seen or None


def redis_full(stage: Stage, event: Event) -> str | None:
    def refused(client: Redis) -> int:
        return int(client.info("errorstats").get("errorstat_OOM", {}).get("count", 0))

    with _redis(stage) as client:
        before = refused(client)
        client.config_set("maxmemory", "1")
        try:
            stage.last(event)
        finally:
            client.config_set("maxmemory", "0")
        count = refused(client) - before
    return f"{count} commands refused" if count > 0 else None


def redis_connections_closed(stage: Stage, event: Event) -> str | None:
    with _redis(stage) as client:
        closed = int(client.client_kill_filter(_type="normal", skipme=True))
    return f"{closed} connections" if closed else None


def postgres_restarted(stage: Stage, event: Event) -> str | None:
    return _postgres_ended(stage, event, stage.floor.postgres.stop)


def postgres_killed(stage: Stage, event: Event) -> str | None:
    return _postgres_ended(stage, event, stage.floor.postgres.kill)


def _postgres_ended(stage: Stage, event: Event, end: Callable[[], None]) -> str | None:
    postgres = stage.floor.postgres
    before = postgres.pid
    end()
    stage.last(event)
    postgres.start()
    return f"{before} is now {postgres.pid}" if before not in (None, postgres.pid) else None


def postgres_connections_terminated(stage: Stage, event: Event) -> str | None:
    terminate = (
        "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with psycopg.connect(stage.floor.service.database_url) as connection:
        row = connection.execute(terminate).fetchone()
    return f"{row[0]} connections" if row and row[0] else None


def provider_killed(stage: Stage, event: Event) -> str | None:
    provider = stage.floor.provider
    before = provider.pid
    provider.kill()
    stage.last(event)
    provider.start()
    return f"{before} is now {provider.pid}" if before not in (None, provider.pid) else None


def wire_cut(stage: Stage, event: Event) -> str | None:
    return _wire(stage, event, Proxy.cut, lambda wire: wire.broken + wire.refused, "connections broken")


def wire_held(stage: Stage, event: Event) -> str | None:
    return _wire(stage, event, Proxy.hold, lambda wire: wire.held, "chunks held", deliver=event.draw % 2 == 0)


def wire_slow(stage: Stage, event: Event) -> str | None:
    """Every chunk is 10 to 300 ms late."""
    seconds = 0.01 + event.draw % 290 / 1000
    return _wire(stage, event, lambda wire: wire.delay(seconds), lambda wire: wire.delayed, "chunks late")


def replies_lost(stage: Stage, event: Event) -> str | None:
    """What is asked is executed, and one answer in two to nine is lost with its connection."""
    every, asked = 2 + event.draw % 8, 0

    def when(_: bytes) -> bool:
        nonlocal asked
        asked += 1
        return asked % every == 0

    # Far more than can be asked in the time.
    return _wire(stage, event, lambda wire: wire.drop_reply(when, 1_000_000), lambda wire: wire.dropped, "replies lost")


def _wire(
    stage: Stage,
    event: Event,
    begin: Callable[[Proxy], None],
    counted: Callable[[Proxy], int],
    what: str,
    *,
    deliver: bool = False,
) -> str | None:
    wire = stage.wires[event.target]
    before = counted(wire)
    begin(wire)
    try:
        stage.last(event)
    finally:
        count = counted(wire) - before
        wire.restore(deliver=deliver)
    return f"{count} {what}" if count else None


FAULTS: dict[str, Fault] = {
    **{f"{line} killed": killed for line in ("web", "lanes", "charges", "sweep")},
    **{f"{line} stopped": stopped for line in ("web", "lanes", "charges")},
    **{f"{line} frozen": frozen for line in ("web", "lanes", "charges", "sweep")},
    "a lane's process killed": child_killed,
    "a lane's process frozen": child_frozen,
    "redis killed": redis_killed,
    "redis killed, its log cut short": redis_log_cut,
    "redis flushed": redis_flushed,
    "redis paused": redis_paused,
    "redis frozen": server_frozen,
    "redis out of memory": redis_full,
    "redis connections closed": redis_connections_closed,
    "postgres restarted": postgres_restarted,
    "postgres killed": postgres_killed,
    "postgres connections terminated": postgres_connections_terminated,
    "postgres frozen": server_frozen,
    "provider killed": provider_killed,
    "provider frozen": server_frozen,
    "wire cut": wire_cut,
    "wire held": wire_held,
    "wire slow": wire_slow,
    "replies lost": replies_lost,
}


def _stand_still(stage: Stage, event: Event, members: Iterable[psutil.Process]) -> str | None:
    """SIGSTOP, and SIGCONT when the fault has lasted. A process that ended meanwhile is nobody's business."""
    stopped = [member for member in members if _send(member, signal.SIGSTOP)]
    try:
        still = wait_for(lambda: all(_is_still(member) for member in stopped), _SIGNALLED_WITHIN)
        stage.last(event)
    finally:
        for member in stopped:
            _send(member, signal.SIGCONT)
    return f"{len(stopped)} processes stood still" if stopped and still else None


def _send(process: psutil.Process, number: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
        return True
    return False


def _is_still(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
    return True


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextmanager
def _redis(stage: Stage, within: float = 2.0) -> Iterator[Redis]:
    """A client of its own that asks nothing twice. `within`: a busy machine may keep an answer back for a second."""
    retry = Retry(NoBackoff(), 0)
    url = stage.floor.valkey.url
    with Redis.from_url(url, socket_timeout=within, socket_connect_timeout=within, retry=retry) as client:
        yield client
