"""One line of JSON per request, with its id, safe to read; and no payment token in any log."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ops.embedded.ports import free_port
from producers.access_log import AccessLog
from tests.integration.api_process import BOUND, ROOT, ApiProcess, api_process, command, connected
from tests.integration.event_streams import open_stream
from tests.integration.http_calls import ADMIN, SHOP, assert_problem, call
from tests.integration.shopfloor import until
from tests.processes.process import OwnedProcess

TOKEN = "tok_4f1d9c_secret"
#: Everything speaks as loudly as it can: the libraries of the process and our own log.
DEBUG = (
    "import logging; logging.basicConfig(level=logging.DEBUG); import producers.__main__ as main_module; "
    "from shared.logs import configure_logging; "
    "main_module.configure_logging = lambda: configure_logging(logging.DEBUG)"
)


@pytest.fixture(scope="module")
def logged(api_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    """An API whose log nobody else writes."""
    with api_process(api_environment, tmp_path_factory.mktemp("logged"), before=DEBUG, request_within="1") as running:
        yield running


def order(item: str, **fields: object) -> dict[str, object]:
    return {"item": item, "quantity": 1, "customer": "c-1", "payment_token": TOKEN, **fields}


async def test_a_line_says_who_asked_what_and_how_it_was_answered(logged: ApiProcess) -> None:
    sku, name = f"log-{uuid4().hex[:8]}", f"req-{uuid4().hex}"
    await call("PUT", f"{logged.url}/v1/items/{sku}", ADMIN, {"name": "T", "stock": 5, "price": 1, "currency": "EUR"})
    headers = SHOP | {"Idempotency-Key": uuid4().hex, "X-Request-Id": name}
    bought = await call("POST", f"{logged.url}/v1/purchases", headers, order(sku))
    assert bought.headers["X-Request-Id"] == name
    line = logged.wait_for_event("request", request_id=name)
    assert list(line) == [
        "event", "time", "request_id", "method", "path", "status", "ms", "bytes", "client", "peer",
    ]  # fmt: skip
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/purchases", 202)
    assert (line["bytes"], line["client"], line["peer"]) == (len(bought.text), "shop", "127.0.0.1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert line["ms"] > 0
    assert logged.wait_for_event("request", path=f"/v1/items/{sku}", status=201)["client"] == "admin"

    shown = await call("GET", f"{logged.url}{bought.headers['Location']}?a=query", SHOP | {"X-Request-Id": f"{name}-2"})
    assert shown.status == 200
    line = logged.wait_for_event("request", request_id=f"{name}-2")
    assert line["path"] == bought.headers["Location"]
    head = await call("HEAD", f"{logged.url}/healthz", {"X-Request-Id": f"{name}-3"})
    assert head.status == 200
    line = logged.wait_for_event("request", request_id=f"{name}-3")
    assert (line["method"], line["path"], line["bytes"], line["client"]) == ("HEAD", "/healthz", 0, None)


async def test_a_request_without_an_id_gets_one(logged: ApiProcess) -> None:
    for bad in (None, "", "x" * 65, 'a"b', "a b", "a\tb", "ä", "a;b"):
        answer = await call("GET", f"{logged.url}/healthz", {} if bad is None else {"X-Request-Id": bad})
        made = answer.headers["X-Request-Id"]
        assert re.fullmatch("[0-9a-f]{24}", made)
        logged.wait_for_event("request", request_id=made)
    for good in ("x" * 64, "A.b_c-9"):
        answer = await call("GET", f"{logged.url}/healthz", {"X-Request-Id": good})
        assert answer.headers["X-Request-Id"] == good


@pytest.mark.parametrize(
    ("method", "path", "status", "shown"),
    [
        ("GET", "/nowhere", 404, None),
        ("GET", "/v1/items/no-such", 404, "/v1/items/{sku}"),
        ("GET", "/v1/purchases/no-id", 404, "/v1/purchases/{purchase_id}"),
        ("GET", f"/v1/purchases/{'0' * 32}", 404, f"/v1/purchases/{'0' * 32}"),
        ("OPTIONS", "/v1/items/x", 204, "/v1/items/{sku}"),
        ("PATCH", "/v1/items/x", 405, "/v1/items/{sku}"),
        ("GET", "/problems/sold-out", 200, "/problems/sold-out"),
        ("GET", f"/v1/items/{'x' * 9_000}", 400, "/v1/items/{sku}"),
        ("GET", "/%0d%0a%7b%22event%22:%22request%22%7d", 404, None),
        ("GET", "/v1/items/%1b%5b2J%22", 400, "/v1/items/{sku}"),
    ],
)
async def test_a_path_is_what_we_routed_by(
    logged: ApiProcess, method: str, path: str, status: int, shown: str | None
) -> None:
    name = uuid4().hex
    assert (await call(method, f"{logged.url}{path}", SHOP | {"X-Request-Id": name})).status == status
    line = logged.wait_for_event("request", request_id=name)
    assert (line["path"], line["status"]) == (shown, status)


async def test_what_the_server_answers_itself_is_logged_under_its_id(logged: ApiProcess) -> None:
    async with connected(logged) as connection:
        connection.send("nonsense\r\n\r\n")
        answer = await connection.answer()
    line = logged.wait_for_event("request", request_id=answer.headers["x-request-id"])
    assert (line["method"], line["path"], line["status"], line["peer"]) == (None, None, 400, "127.0.0.1")
    assert line["bytes"] == len(answer.body)


async def test_a_client_that_leaves_before_its_answer_is_logged_without_one(logged: ApiProcess) -> None:
    name = uuid4().hex
    async with connected(logged) as connection:
        connection.send(
            f"PUT /v1/items/left HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer admin-secret\r\nX-Request-Id: {name}\r\n"
        )
        connection.send("Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        connection.end()
        await connection.closed()
    line = logged.wait_for_event("request", request_id=name)
    assert (line["status"], line["bytes"]) == (None, 0)


async def test_a_client_that_leaves_while_its_answer_is_held_is_logged_without_one(logged: ApiProcess) -> None:
    sku, name = f"log-{uuid4().hex[:8]}", uuid4().hex
    await call("PUT", f"{logged.url}/v1/items/{sku}", ADMIN, {"name": "T", "stock": 5, "price": 1, "currency": "EUR"})
    bought = await call("POST", f"{logged.url}/v1/purchases", SHOP | {"Idempotency-Key": name}, order(sku))
    async with connected(logged) as connection:
        connection.send(f"GET {bought.headers['Location']} HTTP/1.1\r\nHost: x\r\nPrefer: wait=30\r\n")
        connection.send(f"Authorization: Bearer shop-secret\r\nX-Request-Id: {name}\r\n\r\n")
        connection.end()
        assert await connection.closed() == b""
    line = logged.wait_for_event("request", request_id=name)
    assert (line["status"], line["bytes"], line["client"]) == (None, 0, "shop")


async def test_no_payment_token_is_in_any_log(logged: ApiProcess) -> None:
    sku = f"log-{uuid4().hex[:8]}"
    await call("PUT", f"{logged.url}/v1/items/{sku}", ADMIN, {"name": "T", "stock": 5, "price": 1, "currency": "EUR"})
    post = f"{logged.url}/v1/purchases"

    def keyed() -> dict[str, str]:
        return SHOP | {"Idempotency-Key": uuid4().hex}

    json_body = {"Content-Type": "application/json"}
    bought = await call("POST", post, keyed(), order(sku))
    assert bought.status == 202
    answers = [
        bought,
        await call("POST", post, keyed(), order(sku, token=TOKEN)),
        await call("POST", post, keyed(), order(sku, payment_token=[TOKEN])),
        await call("POST", post, keyed(), order(sku, payment_token=f"{TOKEN}\x00")),
        await call("POST", post, keyed() | json_body, data=json.dumps(order(sku)).encode()[:-1]),
        await call("POST", post, keyed() | json_body, data=f'"{TOKEN}'.encode()),
        await call("POST", post, keyed() | json_body, data=TOKEN.encode().ljust(20_000)),
        await call("POST", post, keyed() | {"Content-Type": TOKEN}, data=b"{}"),
        await call("POST", f"{post}?payment_token={TOKEN}", keyed(), order(sku)),
        await call("POST", f"{post}/{TOKEN}", keyed(), order(sku)),
        await call("POST", post, keyed() | {"X-Payment-Token": TOKEN, "User-Agent": TOKEN}, order(sku)),
        await call("POST", post, {"Idempotency-Key": TOKEN, "Authorization": f"Bearer {TOKEN}"}, order(sku)),
        await call("POST", post, SHOP | {"Idempotency-Key": f"ä{TOKEN}"}, order(sku)),
        await call("POST", post, keyed() | {"X-Request-Id": f"{TOKEN}!"}, order(sku)),
        await call("GET", f"{logged.url}{bought.headers['Location']}", SHOP),
    ]
    # A field that is not known and an item that is not there are named to whoever asked, and to nobody else.
    await call("POST", post, keyed(), {TOKEN: 1, **order(sku)})
    await call("POST", post, keyed(), order(TOKEN))
    await call("GET", f"{post}/{TOKEN}", SHOP)
    await call("GET", f"{logged.url}/{TOKEN}", SHOP)
    await call("GET", f"{logged.url}/v1/items/{TOKEN}", SHOP)
    await call("HEAD", f"{logged.url}/v1/items/{TOKEN}", SHOP)
    await call("OPTIONS", f"{logged.url}/v1/items/{TOKEN}", SHOP)
    await call("PUT", f"{logged.url}/v1/items/{TOKEN}!", ADMIN, {"name": TOKEN, "payment_token": TOKEN})
    await call("GET", f"{logged.url}/problems/{TOKEN}")
    async with open_stream(f"{logged.url}{bought.headers['Location']}/events?{TOKEN}", SHOP):
        pass
    # Half a request, and what is none.
    async with connected(logged) as connection:
        connection.send(f"POST /v1/purchases HTTP/1.1\r\nHost: x\r\nX-Token: {TOKEN}\r\nContent-Length: 999\r\n")
        connection.send(f"Authorization: Bearer shop-secret\r\nIdempotency-Key: {uuid4()}\r\n")
        connection.send(f'Content-Type: application/json\r\n\r\n{{"payment_token": "{TOKEN}"')
        assert (await connection.answer()).status == 408
    async with connected(logged) as connection:
        connection.send(f"{TOKEN} {TOKEN} {TOKEN}\r\n{TOKEN}\r\n\r\n")
        assert (await connection.answer()).status == 400
    last = uuid4().hex
    await call("GET", f"{logged.url}/healthz", {"X-Request-Id": last})
    logged.wait_for_event("request", request_id=last)

    written = logged.process.logs()
    assert "DEBUG" in written  # it did speak as loudly as it can
    assert TOKEN not in written
    for answer in answers:
        assert TOKEN not in answer.text
        assert TOKEN not in str(answer.headers)


async def test_log_lines_of_a_request_have_its_id_and_no_token(api_environment: dict[str, str], tmp_path: Path) -> None:
    without_redis = api_environment | {"FAIRLANE_REDIS_URL": f"redis://127.0.0.1:{free_port()}"}
    with api_process(without_redis, tmp_path, ready="/healthz", access_log="false") as api:
        headers = SHOP | {"Idempotency-Key": TOKEN, "X-Request-Id": "without-redis"}
        refused = await call("POST", f"{api.url}/v1/purchases", headers, order("log"))
        assert_problem(refused, 503, "unavailable")
        assert refused.headers["X-Request-Id"] == "without-redis"
        assert api.wait_for_event("part_unavailable")["request_id"] == "without-redis"
        assert TOKEN not in api.process.logs()
        # And a line per request only where there is an access log.
        assert api.events("request") == []


async def test_lines_that_a_full_disk_took_are_counted() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    reader, writer = os.pipe()
    log = AccessLog(full)
    scope = {"client": ("::1", 1), "headers": [], "state": {"client": 'sh"o\x9bp\n'}}
    try:
        for _ in range(3):
            log.add(scope, 400, 0.0015, 7)
        log.flush()
        await until(lambda: log.lost == 3)
        os.dup2(writer, full)
        log.add(scope, None, 0.25, 0)
        log.end()
        assert log.lost == 0
        lost, line = os.read(reader, 10_000).splitlines()
    finally:
        for descriptor in (full, reader, writer):
            os.close(descriptor)
    assert json.loads(lost) | {"time": ""} == {"event": "access_log_lost", "time": "", "lines": 3}
    assert line.isascii()
    found = json.loads(line)
    assert (found["client"], found["peer"], found["ms"]) == ('sh"o\\x9bp\\n', "::1", 250.0)


async def test_a_line_that_was_broken_off_spoils_no_other() -> None:
    reader, writer = os.pipe()
    # Then the pipe takes what it has room for and no more, as a disk does that is nearly full.
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4_096)
    os.set_blocking(writer, False)
    log = AccessLog(writer)
    try:
        for _ in range(50):
            log.add({"client": None, "headers": []}, 200, 0.0, 0)
        log.flush()
        await until(lambda: log.lost > 0)
        *whole, torn = os.read(reader, 10_000).split(b"\n")
        log.add({"client": None, "headers": []}, 204, 0.0, 0)
        log.end()
        end, *lines = os.read(reader, 10_000).splitlines()
    finally:
        os.close(reader)
        os.close(writer)
    assert (torn[:1], end) == (b"{", b"")
    assert {json.loads(line)["status"] for line in whole} == {200}
    lost, line = map(json.loads, lines)
    assert (lost["event"], lost["lines"], line["status"]) == ("access_log_lost", 50 - len(whole), 204)


async def test_the_requests_of_a_turn_are_written_together() -> None:
    # Each write is a message of its own.
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = AccessLog(writer.fileno())
    with reader, writer:
        for number in range(50):
            log.add({"client": None, "headers": []}, 200 + number, 0.0, 0)
        assert select.select([reader], [], [], 0.05)[0] == []
        await asyncio.sleep(0)  # a turn of the loop
        lines = reader.recv(100_000).splitlines()
        log.end()
    assert [json.loads(line)["status"] for line in lines] == list(range(200, 250))


async def test_a_log_that_nobody_reads_holds_up_no_answer_and_no_end(
    api_environment: dict[str, str], tmp_path: Path
) -> None:
    """As after Ctrl-S at a terminal, or when what reads the log stands still."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4_096)
    port = free_port()
    environment = {**api_environment, "FAIRLANE_PORT": str(port)}
    before = f"import os; os.dup2(os.open('/proc/{os.getpid()}/fd/{writer}', os.O_WRONLY), 1); "
    before += "import producers.access_log as access_log; access_log._MOST_WAITING = 50"
    with OwnedProcess(command(before), log=tmp_path / "api.log", env=environment, cwd=ROOT) as api:
        async with asyncio.timeout(BOUND):
            while not await answers(port):
                assert api.alive
        os.close(writer)
        async with connected(f"http://127.0.0.1:{port}") as connection:
            for _ in range(200):
                connection.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await connection.answer()).status == 200

            found: list[dict[str, Any]] = []
            rest = b""

            async def read_until(enough: Callable[[], bool]) -> None:
                nonlocal rest
                async with asyncio.timeout(BOUND):
                    while not enough():
                        *lines, rest = (rest + await asyncio.to_thread(os.read, reader, 4_096)).split(b"\n")
                        found.extend(map(json.loads, lines))

            def lost() -> int:
                return sum(line["lines"] for line in found if line["event"] == "access_log_lost")

            def logged() -> int:
                return sum(line["event"] == "request" for line in found)

            await read_until(lambda: logged() + lost() == 201)
            # Fifty may have been under way, fifty waited, and the pipe took some twenty.
            assert lost() >= 50
            assert logged() >= 50

            # And once more, until it stops.
            for _ in range(200):
                connection.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await connection.answer()).status == 200
            api.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(api.wait_exit, BOUND) == 0
    os.close(reader)


async def answers(port: int) -> bool:
    """Whether there is an API that answered a request."""
    try:
        async with connected(f"http://127.0.0.1:{port}") as connection:
            connection.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            return (await connection.answer()).status == 200
    except OSError:
        return False
