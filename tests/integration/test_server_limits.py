"""A slow or huge client holds nobody up: what a connection may send, in what time, and how many there may be."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from uuid import uuid4

import psutil
import pytest

from producers.connections import listen
from producers.problems import CATALOGUE
from tests.integration.api_process import BOUND, ApiProcess, api_process, command, connected, variables
from tests.integration.http_calls import ADMIN, SHOP, assert_problem, call
from tests.integration.serving import serving
from tests.integration.shopfloor import Shop, until

ITEM = json.dumps({"name": "Ticket", "stock": 5, "price": 4900, "currency": "EUR"})
CHUNKED_ITEM = f"{len(ITEM):x}\r\n{ITEM}\r\n0\r\n\r\n"
HEALTHZ = "GET /healthz HTTP/1.1\r\nHost: x\r\n"
KEYED = "Host: x\r\nAuthorization: Bearer admin-secret\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def hasty(api_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    """An API that waits a second where the usual one waits ten or sixty-five."""
    directory = tmp_path_factory.mktemp("hasty")
    with api_process(api_environment, directory, request_within="1", keep_alive="1") as running:
        yield running


@pytest.fixture(scope="module")
def patient(api_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    """An API that waits for an hour: whatever is cut there is not cut for being late."""
    directory = tmp_path_factory.mktemp("patient")
    with api_process(api_environment, directory, request_within="3600", keep_alive="3600") as running:
        yield running


@pytest.fixture(scope="module")
def soon_left(api_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    """An API that waits for an hour for the rest of a request, and a second for the next."""
    directory = tmp_path_factory.mktemp("soon-left")
    with api_process(api_environment, directory, request_within="3600", keep_alive="1") as running:
        yield running


class TestSlow:
    @pytest.mark.parametrize("begun", ["G", "GET /healthz HTT", HEALTHZ, f"{HEALTHZ}X-Slow: "])
    async def test_a_head_that_does_not_end_is_answered_and_cut(self, hasty: ApiProcess, begun: str) -> None:
        async with connected(hasty) as connection:
            connection.send(begun)
            answer = await connection.answer()
            assert (answer.status, answer.slug) == (408, "request-timeout")
            assert answer.headers["connection"] == "close"
            assert await connection.closed() == b""

    async def test_a_head_in_drops_is_cut_as_well(self, hasty: ApiProcess) -> None:
        async with connected(hasty) as connection:
            connection.send(HEALTHZ)
            await connection.drip("X-Drop: 1\r\n")
            assert (await connection.answer()).slug == "request-timeout"

    @pytest.mark.parametrize("length", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
    async def test_a_body_that_does_not_end_is_answered_and_cut(self, hasty: ApiProcess, length: str) -> None:
        sku = f"slow-{uuid4().hex[:8]}"
        async with connected(hasty) as connection:
            connection.send(f"PUT /v1/items/{sku} HTTP/1.1\r\n{KEYED}{length}\r\n\r\n")
            connection.send(f"{len(ITEM):x}\r\n{ITEM}\r\n" if "chunked" in length else ITEM)
            assert (await connection.answer()).slug == "request-timeout"
            assert await connection.closed() == b""
        assert_problem(await call("GET", f"{hasty.url}/v1/items/{sku}", SHOP), 404, "unknown-item")
        line = hasty.wait_for_event("request", path="/v1/items/{sku}", method="PUT", status=408)
        assert line["bytes"] == 0

    async def test_a_body_in_drops_is_cut_as_well(self, hasty: ApiProcess) -> None:
        async with connected(hasty) as connection:
            connection.send(f"PUT /v1/items/slow HTTP/1.1\r\n{KEYED}Content-Length: 10000\r\n\r\n")
            await connection.drip(" ")
            assert (await connection.answer()).slug == "request-timeout"

    async def test_a_body_is_waited_for_no_longer_when_it_was_answered_before(self, hasty: ApiProcess) -> None:
        async with connected(hasty) as connection:
            connection.send("POST /v1/purchases HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n")
            connection.send("Content-Type: application/json\r\n\r\n")
            assert (await connection.answer()).slug == "unauthorized"
            await connection.drip(" ")
            assert await connection.closed() == b""

    async def test_who_says_nothing_is_left(self, hasty: ApiProcess) -> None:
        async with connected(hasty) as connection:
            assert await connection.closed() == b""

    async def test_who_says_nothing_more_is_left(self, hasty: ApiProcess) -> None:
        async with connected(hasty) as connection:
            connection.send(f"{HEALTHZ}\r\n")
            assert (await connection.answer()).status == 200
            assert await connection.closed() == b""

    async def test_empty_lines_keep_no_connection(self, hasty: ApiProcess) -> None:
        async with connected(hasty) as connection:
            await connection.drip("\r\n")
            assert await connection.closed() == b""

    async def test_a_rest_of_a_body_that_came_late_leaves_the_connection_to_the_next_request(
        self, patient: ApiProcess
    ) -> None:
        async with connected(patient) as connection:
            connection.send("POST /v1/purchases HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n")
            connection.send("Content-Type: application/json\r\n\r\n{")
            assert (await connection.answer()).slug == "unauthorized"
            connection.send("  ")
            connection.send(f"{HEALTHZ}\r\n")
            assert (await connection.answer()).status == 200

    async def test_a_rest_of_a_body_begins_the_time_of_an_idle_connection(self, soon_left: ApiProcess) -> None:
        async with connected(soon_left) as connection:
            connection.send("POST /v1/purchases HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n")
            connection.send("Content-Type: application/json\r\n\r\n{")
            assert (await connection.answer()).slug == "unauthorized"
            connection.send("  ")
            assert await connection.closed() == b""

    async def test_who_closes_its_side_in_a_request_is_gone(self, patient: ApiProcess) -> None:
        async with connected(patient) as connection:
            connection.send(f"PUT /v1/items/half HTTP/1.1\r\n{KEYED}Content-Length: 1000\r\n\r\n{ITEM}")
            connection.end()
            assert await connection.closed() == b""


class TestHuge:
    @pytest.mark.parametrize(
        "head",
        [
            f"{HEALTHZ}X-Huge: {'x' * 66_000}",
            f"{HEALTHZ}X-Huge: {'x' * 66_000}\r\n\r\n",
            f"{HEALTHZ}{'x' * 66_000}",
            f"GET /{'x' * 66_000}",
            f"GET /{'x' * 66_000} HTTP/1.1\r\nHost: x\r\n\r\n",
            HEALTHZ + "X-Many: 1\r\n" * 100 + "\r\n",
            HEALTHZ + f"X-Large: {'x' * 1_000}\r\n" * 70,
        ],
        ids=["value-without-end", "value", "name-without-end", "path-without-end", "path", "many", "together"],
    )
    async def test_a_huge_head_is_refused(self, patient: ApiProcess, head: str) -> None:
        async with connected(patient) as connection:
            connection.send(head)
            answer = await connection.answer()
            assert (answer.status, answer.slug) == (431, "headers-too-large")
            assert await connection.closed() == b""

    async def test_a_flood_of_headers_is_refused_while_it_comes(self, patient: ApiProcess) -> None:
        async with connected(patient) as connection:
            connection.send(HEALTHZ)
            await connection.drip("X-Flood: 1\r\n" * 20)
            assert (await connection.answer()).slug == "headers-too-large"

    async def test_a_head_at_the_bounds_is_taken(self, patient: ApiProcess) -> None:
        async with connected(patient) as connection:
            connection.send(HEALTHZ + "X-Many: 1\r\n" * 99 + "\r\n")
            assert (await connection.answer()).status == 200
            connection.send(f"{HEALTHZ}X-Large: {'x' * 65_000}\r\n\r\n")
            assert (await connection.answer()).status == 200

    async def test_a_large_body_leaves_the_connection(self, patient: ApiProcess) -> None:
        async with connected(patient) as connection:
            connection.send(f"PUT /v1/items/huge HTTP/1.1\r\n{KEYED}Content-Length: 200000\r\n\r\n{' ' * 200_000}")
            assert (await connection.answer()).slug == "too-large"
            connection.send(f"{HEALTHZ}\r\n")
            assert (await connection.answer()).status == 200

    @pytest.mark.parametrize("length", ["Content-Length: 100000000", "Transfer-Encoding: chunked"])
    async def test_a_body_that_goes_on_and_on_is_cut_after_its_answer(self, patient: ApiProcess, length: str) -> None:
        async with connected(patient) as connection:
            connection.send(f"PUT /v1/items/huge HTTP/1.1\r\n{KEYED}{length}\r\n\r\n")
            for _ in range(75):
                connection.send(f"4e20\r\n{' ' * 20_000}\r\n" if "chunked" in length else " " * 20_000)
            assert (await connection.answer()).slug == "too-large"
            assert await connection.closed() == b""

    async def test_what_surrounds_the_chunks_of_a_body_is_bounded(self, patient: ApiProcess) -> None:
        async with connected(patient) as connection:
            connection.send(f"PUT /v1/items/huge HTTP/1.1\r\n{KEYED}Transfer-Encoding: chunked\r\n\r\n")
            connection.send(f"1\r\n{{\r\n1;{'x' * 1_500_000}")
            assert (await connection.answer()).slug == "too-large"
            assert await connection.closed() == b""


class TestLastAnswer:
    @pytest.mark.parametrize("last", ["HTTP/1.1\r\nConnection: close", "HTTP/1.0"])
    @pytest.mark.parametrize(
        ("head", "begun", "rest", "status"),
        [
            (f"PUT /v1/items/huge {{last}}\r\n{KEYED}Content-Length: 500000", 100_000, 400_000, 413),
            (f"PUT /v1/items/huge {{last}}\r\n{KEYED}Content-Length: 500000", 0, 500_000, 413),
            ("POST /v1/purchases {last}\r\nContent-Type: application/json\r\nContent-Length: 9000", 1, 8_999, 401),
            ("POST /v1/purchases {last}\r\nContent-Length: 9000", 0, 9_000, 415),
        ],
        ids=["413", "413-at-its-head", "401", "415"],
    )
    def test_who_is_refused_in_the_middle_of_a_request_can_send_it_all_and_read_why(
        self, patient: ApiProcess, last: str, head: str, begun: int, rest: int, status: int
    ) -> None:
        with socket.create_connection(("127.0.0.1", patient.port), timeout=BOUND) as connection:
            connection.sendall(f"{head.format(last=last)}\r\n\r\n".encode() + b" " * begun)
            answer = connection.recv(1)
            # A connection that was reset would fail at the second of these, if not at the first.
            connection.sendall(b" " * (rest // 2))
            connection.sendall(b" " * (rest - rest // 2))
            connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65_536):
                answer += more
        first_line, *_ = answer.split(b"\r\n")
        assert int(first_line.split()[1]) == status
        assert answer.endswith(b"}")

    async def test_who_sends_no_rest_and_does_not_hang_up_is_left(self, shop: Shop) -> None:
        async with serving(shop.settings) as api, connected(api.url) as connection:
            connection.send("POST /v1/purchases HTTP/1.0\r\nContent-Length: 9\r\n\r\n")
            assert (await connection.answer()).slug == "not-json"
            # Which is more than the end of the server's side.
            await until(lambda: api.connections == 0)


class TestInOrder:
    async def test_requests_sent_together_are_answered_in_their_order(self, patient: ApiProcess) -> None:
        await call("PUT", f"{patient.url}/v1/items/pipelined", ADMIN, json.loads(ITEM))
        order = json.dumps({"item": "pipelined", "quantity": 1, "customer": "c", "payment_token": "tok_visa"})
        async with connected(patient) as connection:
            for number in range(20):
                connection.send(
                    f"POST /v1/purchases HTTP/1.1\r\nHost: x\r\nX-Request-Id: n{number}\r\n"
                    f"Idempotency-Key: {uuid4()}\r\nAuthorization: Bearer shop-secret\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(order)}\r\n\r\n{order}"
                    f"{HEALTHZ}X-Request-Id: h{number}\r\n\r\n"
                )
            for number in range(20):
                answer = await connection.answer()
                assert (answer.headers["x-request-id"], answer.status in {202, 503, 409}) == (f"n{number}", True)
                answer = await connection.answer()
                assert (answer.headers["x-request-id"], answer.status) == (f"h{number}", 200)

    @pytest.mark.parametrize(
        ("bad", "status", "slug"),
        [
            ("nonsense\r\n\r\n", 400, "malformed"),
            ("GET /healthz HTTP/1.1\r\nHost x\r\n\r\n", 400, "malformed"),
            (f"{HEALTHZ}X-Huge: {'x' * 66_000}\r\n\r\n", 431, "headers-too-large"),
            ("GET /v1/st\xe4tus HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed"),
            ("PUT /v1/items/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", 400, "malformed"),
        ],
        ids=["no-http", "no-header", "huge", "no-ascii", "no-chunks"],
    )
    async def test_a_bad_request_is_answered_in_its_turn_and_ends_the_connection(
        self, patient: ApiProcess, bad: str, status: int, slug: str
    ) -> None:
        async with connected(patient) as connection:
            connection.send(f"{HEALTHZ}\r\nGET /readyz HTTP/1.1\r\nHost: x\r\n\r\n{bad}{HEALTHZ}\r\n".encode("latin-1"))
            first, second = await connection.answer(), await connection.answer()
            assert (b"parts" in first.body, b"parts" in second.body) == (False, True)
            third = await connection.answer()
            assert (third.status, third.slug) == (status, slug)
            assert await connection.closed() == b""

    async def test_a_field_behind_the_body_is_none_of_the_head(self, patient: ApiProcess) -> None:
        async with connected(patient) as connection:
            connection.send("PUT /v1/items/trailer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            connection.send(f"Transfer-Encoding: chunked\r\n\r\n{len(ITEM):x}\r\n{ITEM}\r\n")
            connection.send("0\r\nAuthorization: Bearer admin-secret\r\n\r\n")
            assert (await connection.answer()).slug == "unauthorized"

    @pytest.mark.parametrize(
        "body", [f"Content-Length: {len(ITEM)}\r\n\r\n{ITEM}", f"Transfer-Encoding: chunked\r\n\r\n{CHUNKED_ITEM}"]
    )
    async def test_who_asks_for_another_protocol_is_answered_in_this_one(self, patient: ApiProcess, body: str) -> None:
        upgrade = f"PUT /v1/items/upgrade HTTP/1.1\r\n{KEYED}Connection: Upgrade, HTTP2-Settings\r\n"
        upgrade += f"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n{body}"
        async with connected(patient) as connection:
            connection.send(f"{upgrade}{upgrade}{HEALTHZ}\r\n")
            assert (await connection.answer()).status in {200, 201}
            assert (await connection.answer()).status == 200
            assert b"ok" in (await connection.answer()).body

    async def test_nobody_gets_a_tunnel(self, patient: ApiProcess) -> None:
        async with connected(patient) as connection:
            connection.send("CONNECT elsewhere.example:443 HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n")
            assert (await connection.answer()).slug == "malformed"
            assert await connection.closed() == b""


#: What a shell gives a process on most systems, made small.
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2000))"


class TestConnections:
    async def test_more_than_there_may_be_are_told_so_at_once_and_a_stop_waits_for_none(
        self, api_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with api_process(
            api_environment, tmp_path_factory.mktemp("few"), before=LIMITED, connections="3", ready="/healthz"
        ) as few:
            assert psutil.Process(few.process.pid).rlimit(resource.RLIMIT_NOFILE) == (2_000, 2_000)
            async with AsyncExitStack() as stack:
                held = [await stack.enter_async_context(connected(few)) for _ in range(3)]
                for connection in held:
                    connection.send(f"{HEALTHZ}\r\n")
                    assert (await connection.answer()).status == 200
                refused = await call("GET", f"{few.url}/v1/items", SHOP)
                assert_problem(refused, 503, "unavailable")
                assert refused.headers["Retry-After"] == "1"
                assert (await call("GET", f"{few.url}/healthz")).status == 200
                async with connected(few) as silent:
                    assert await silent.closed() == b""
                # Those that are served are served on.
                held[0].send("GET /v1/items HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer shop-secret\r\n\r\n")
                assert (await held[0].answer()).status == 200
            few.wait_for_event("request", status=503, path=None)

            # They are gone once the server has heard of it.
            async with asyncio.timeout(BOUND):
                while (await call("GET", f"{few.url}/v1/items", SHOP)).status != 200:
                    continue
            async with connected(few) as begun, connected(few) as bad:
                begun.send(HEALTHZ)
                bad.send("nonsense\r\n\r\n")
                assert (await bad.answer()).status == 400
                few.process.send_signal(signal.SIGTERM)
                assert await begun.closed() == b""
                assert few.process.wait_exit(30) == 0

    def test_more_than_the_process_may_open_stop_it_at_start(self, api_environment: dict[str, str]) -> None:
        environment = {**api_environment, **variables({"connections": "1900", "port": "0"})}
        ended = subprocess.run(command(LIMITED), env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        assert ended.stderr.count("\n") == 1
        assert "FAIRLANE_CONNECTIONS" in ended.stderr

    def test_a_peer_that_is_gone_is_let_go_by_the_kernel(self) -> None:
        with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000


def test_the_new_problems_have_pages() -> None:
    assert CATALOGUE["request-timeout"].status == 408
    assert CATALOGUE["headers-too-large"].status == 431
