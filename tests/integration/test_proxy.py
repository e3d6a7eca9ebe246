"""The proxy of the fault tests fails as it says, and otherwise does not get in the way."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ops.embedded import EmbeddedServers
from shared.settings import Settings
from tests.processes.process import wait_for
from tests.processes.proxy import Proxy

BOUND = 10.0


def redis_client(url: str, timeout: float = BOUND) -> redis.Redis:
    """One connection that asks nothing twice."""
    return redis.Redis.from_url(url, socket_timeout=timeout, retry=Retry(NoBackoff(), 0), single_connection_client=True)


@pytest.fixture
def proxy(settings: Settings) -> Iterator[Proxy]:
    """A proxy before the run's Redis, which is empty."""
    with Proxy.to(settings.redis_url) as running:
        yield running


@pytest.fixture
def client(proxy: Proxy, settings: Settings) -> Iterator[redis.Redis]:
    """A client that goes through it."""
    with redis_client(proxy.url(settings.redis_url)) as client:
        yield client


def test_it_names_itself_in_a_url_and_nothing_else(settings: Settings) -> None:
    with Proxy("127.0.0.1", 1) as proxy:
        assert proxy.url("postgresql+psycopg://me:p%40ss@db.example:5432/sale?a=1") == (
            f"postgresql+psycopg://me:p%40ss@127.0.0.1:{proxy.port}/sale?a=1"
        )
        assert proxy.url("redis://localhost:6379/2") == f"redis://127.0.0.1:{proxy.port}/2"


def test_it_carries_small_and_large_messages(client: redis.Redis, proxy: Proxy) -> None:
    for number in range(1000):
        assert client.incr("n") == number + 1
    large = "x" * 20_000_000
    client.set("large", large)
    assert client.get("large") == large.encode()
    assert proxy.connections == 1


def test_it_speaks_postgres(settings: Settings) -> None:
    url = settings.database_url.replace("+psycopg", "")
    with Proxy.to(url) as proxy, psycopg.connect(proxy.url(url)) as connection:
        assert connection.execute("SELECT count(*) FROM fairlane.lanes").fetchone() == (settings.lanes,)
        assert proxy.connections == 1


def test_a_server_that_is_not_there_breaks_the_connection() -> None:
    with Proxy("127.0.0.1", 9) as proxy, pytest.raises(redis.ConnectionError):
        redis_client(f"redis://127.0.0.1:{proxy.port}")


def test_a_side_that_closes_closes_the_other(settings: Settings, proxy: Proxy) -> None:
    with redis_client(settings.redis_url) as direct:
        before = len(direct.client_list())
        with redis_client(proxy.url(settings.redis_url)) as client:
            client.ping()
            assert len(direct.client_list()) == before + 1
        assert wait_for(lambda: len(direct.client_list()) == before and proxy.open == 0, BOUND)
        with redis_client(proxy.url(settings.redis_url)) as client:
            direct.client_kill_filter(_id=client.client_id())
            with pytest.raises(redis.ConnectionError):
                client.ping()


class TestCut:
    def test_connections_break_and_new_ones_too_until_it_is_restored(self, client: redis.Redis, proxy: Proxy) -> None:
        client.set("there", "1")
        proxy.cut()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.get("there")
        assert (proxy.broken, proxy.refused) == (1, 1)
        proxy.restore()
        assert client.get("there") == b"1"

    def test_the_server_hears_of_it(self, client: redis.Redis, proxy: Proxy, settings: Settings) -> None:
        with redis_client(settings.redis_url) as direct:
            client.ping()
            connected = len(direct.client_list())
            proxy.cut()
            assert wait_for(lambda: len(direct.client_list()) == connected - 1, BOUND)


class TestHold:
    def test_nothing_passes_and_nobody_hears_why(self, proxy: Proxy, settings: Settings) -> None:
        with (
            redis_client(proxy.url(settings.redis_url), 0.2) as client,
            redis_client(settings.redis_url) as direct,
        ):
            client.ping()
            connected = direct.client_list()
            proxy.hold()
            with pytest.raises(redis.TimeoutError):
                client.set("lost", "1")
            # The client gave its connection up, and the server does not know.
            assert {each["id"] for each in connected} <= {each["id"] for each in direct.client_list()}
            with pytest.raises(redis.TimeoutError):  # a new connection is taken, and nothing comes of it
                client.set("lost", "2")
            assert proxy.held >= 2
            proxy.restore()
            assert client.get("lost") is None
            assert wait_for(lambda: proxy.open == 1, BOUND)

    def test_it_may_begin_with_a_certain_request(self, proxy: Proxy, settings: Settings) -> None:
        with redis_client(proxy.url(settings.redis_url), 0.2) as client:
            proxy.hold(lambda request: b"INCR" in request)
            client.set("n", 5)
            assert proxy.held == 0
            for command in ("INCR", "GET"):
                with pytest.raises(redis.TimeoutError):
                    client.execute_command(command, "n")
            proxy.restore()
            assert client.get("n") == b"5"
            assert client.incr("n") == 6

    def test_a_reply_is_held_as_well(self, client: redis.Redis, proxy: Proxy, settings: Settings) -> None:
        popped: list[object] = []
        blocked = threading.Thread(target=lambda: popped.append(_popped(client)))
        blocked.start()
        with redis_client(settings.redis_url) as direct:
            assert wait_for(lambda: direct.info("clients")["blocked_clients"] == 1, BOUND)
            proxy.hold()
            direct.rpush("queue", "message")
            assert wait_for(lambda: proxy.held == 1, BOUND)
            assert popped == []
            proxy.restore(deliver=True)
            blocked.join(BOUND)
        assert popped == [(b"queue", b"message")]

    def test_who_was_idle_goes_on_and_who_was_not_is_broken(self, proxy: Proxy, settings: Settings) -> None:
        url = proxy.url(settings.redis_url)
        with redis_client(url) as idle, redis_client(url) as busy:
            id_of_idle = idle.client_id()
            busy.ping()
            proxy.hold()
            failures: list[redis.ConnectionError] = []
            asking = threading.Thread(target=lambda: failures.append(_failure(busy)))
            asking.start()
            assert wait_for(lambda: proxy.held == 1, BOUND)
            proxy.restore()
            asking.join(BOUND)
            assert len(failures) == 1
            assert idle.client_id() == id_of_idle

    def test_delivered_late_it_still_arrives(self, proxy: Proxy, settings: Settings) -> None:
        with (
            redis_client(proxy.url(settings.redis_url), 0.2) as client,
            redis_client(settings.redis_url) as direct,
        ):
            client.ping()
            proxy.hold()
            with pytest.raises(redis.TimeoutError):
                client.set("late", "1")
            assert direct.get("late") is None
            proxy.restore(deliver=True)
            assert wait_for(lambda: direct.get("late") == b"1", BOUND)


def test_delayed_chunks_come_in_their_order() -> None:
    with (
        _Echo() as server,
        Proxy(*server.address) as proxy,
        closing(socket.create_connection(("127.0.0.1", proxy.port), BOUND)) as client,
        client.makefile("rb") as lines,
    ):
        proxy.delay(0.05)
        client.sendall(b"1\n")
        assert wait_for(lambda: proxy.delayed >= 1, BOUND)
        client.sendall(b"2\n")
        assert wait_for(lambda: proxy.delayed >= 2, BOUND)
        proxy.delay(0)
        client.sendall(b"3\n")  # may not overtake what is still on its way
        assert [lines.readline() for _ in range(3)] == [b"1\n", b"2\n", b"3\n"]


class TestDropReply:
    def test_the_command_runs_and_its_reply_is_lost(self, client: redis.Redis, proxy: Proxy) -> None:
        client.set("n", 0)
        proxy.drop_reply(lambda request: b"INCR" in request)
        assert client.get("n") == b"0"  # not meant
        with pytest.raises(redis.ConnectionError):
            client.incr("n")
        assert client.get("n") == b"1"
        assert client.incr("n") == 2
        assert proxy.dropped == 1

    def test_as_often_as_asked_for_and_until_restored(self, client: redis.Redis, proxy: Proxy) -> None:
        proxy.drop_reply(lambda request: b"INCR" in request, times=3)
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.incr("n")
        proxy.restore()
        assert client.incr("n") == 3
        assert proxy.dropped == 2

    def test_a_commit_counts_and_nobody_hears_of_it(self, settings: Settings, servers: EmbeddedServers) -> None:
        url = settings.database_url.replace("+psycopg", "")
        with Proxy.to(url) as proxy:
            proxy.drop_reply(lambda request: b"COMMIT" in request)
            with closing(psycopg.connect(proxy.url(url))) as connection:
                connection.execute("CREATE TABLE kept ()")
                with pytest.raises(psycopg.OperationalError):
                    connection.commit()
            assert proxy.dropped == 1
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT to_regclass('kept') IS NOT NULL").fetchone() == (True,)


def test_it_leaves_no_thread_and_no_socket_behind(settings: Settings) -> None:
    threads = threading.active_count()
    with Proxy.to(settings.redis_url) as proxy, redis_client(proxy.url(settings.redis_url)) as client:
        client.ping()
        port = proxy.port
        proxy.hold()
    assert threading.active_count() == threads
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), BOUND).close()


def _popped(client: redis.Redis) -> object:
    return client.blpop(["queue"])


def _failure(client: redis.Redis) -> redis.ConnectionError:
    with pytest.raises(redis.ConnectionError) as caught:
        client.ping()
    return caught.value


class _Echo:
    """A server that sends everything back."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                self.wfile.write(line)

    def __enter__(self) -> _Echo:
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), self.Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(BOUND)
        self._server.server_close()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._server.server_address[:2]
        return str(host), int(port)
