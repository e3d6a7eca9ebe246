"""The HTTP gateway against a real provider process and, for what none should do, against raw sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from ops.provider.faults import FAULTS
from ops.sandbox import ProviderProcess
from shared.errors import SettingsError
from workers.gateways import (
    Capabilities,
    ChargeOutcome,
    ChargeRequest,
    Confirmed,
    Declined,
    GatewayUnavailable,
    HttpGateway,
    InDoubt,
    NotSent,
    load_gateway,
)
from workers.gateways.body import GuardedBody
from workers.gateways.replies import judge_body, retry_after

#: Seconds. Long enough that no slow machine runs into it, so a test that waits this long has failed.
PATIENT = 20.0

#: Seconds. For calls that must time out, on connections that are already open.
SHORT = 1.0

REJECTED = Declined("provider_rejected")

#: Every fault of the sandbox, and what the table in `workers.gateways` makes of it.
TABLE: dict[str, ChargeOutcome] = {
    "silent_before_charge": InDoubt("timeout"),
    "silent_after_charge": InDoubt("timeout"),
    "slow": InDoubt("timeout"),
    "reset_before_charge": InDoubt("connection_lost"),
    "reset_after_charge": InDoubt("connection_lost"),
    "hang_up_before_charge": InDoubt("connection_lost"),
    "hang_up_after_charge": InDoubt("connection_lost"),
    "half_reply": InDoubt("reply_cut"),
    "stalled_reply": InDoubt("timeout"),
    "500_before_charge": InDoubt("http_500"),
    "500_after_charge": InDoubt("http_500"),
    "503_before_charge": InDoubt("http_503"),
    "redirect_before_charge": InDoubt("http_307"),
    "redirect_after_charge": InDoubt("http_307"),
    "html_201": InDoubt("unreadable_201"),
    "html_402": InDoubt("unreadable_402"),
    "huge_201": InDoubt("reply_too_large"),
    "pending_201": InDoubt("unreadable_201"),
    "other_reference_201": InDoubt("other_reference"),
    "no_id_201": InDoubt("unreadable_201"),
    "unsafe_id_201": InDoubt("unreadable_201"),
    "succeeded_402": InDoubt("unreadable_402"),
    "bare_402": Declined("declined"),
    "good_200": InDoubt("http_200"),
    "empty_204": InDoubt("http_204"),
    "400": REJECTED,
    "401": NotSent("http_401", alert=True),
    "403": NotSent("http_403", alert=True),
    "404": NotSent("http_404", alert=True),
    "409": InDoubt("http_409"),
    "429": NotSent("http_429", retry_after=7.0),
}


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path_factory.mktemp("provider"), latency=0.0) as running:
        yield running


@asynccontextmanager
async def gateway_to(url: str, *, call_timeout: float = PATIENT, connections: int = 8) -> AsyncIterator[HttpGateway]:
    gateway = HttpGateway(url, call_timeout=call_timeout, connections=connections)
    try:
        yield gateway
    finally:
        await gateway.close()


def a_request(token: str = "tok_visa", reference: str | None = None) -> ChargeRequest:
    return ChargeRequest(reference or uuid4().hex, 1250, "EUR", "c-42", token)


def soon() -> float:
    return time.monotonic() + PATIENT


async def ask(provider: ProviderProcess, path: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(provider.url + path) as response:
        return await response.json()


async def posts(provider: ProviderProcess, reference: str) -> int:
    answer = await ask(provider, f"/ledger/posts?reference={reference}")
    return int(answer["posts"])


async def charges(provider: ProviderProcess, reference: str) -> int:
    answer = await ask(provider, f"/charges?reference={reference}")
    return len(answer["charges"])


async def until_posted(provider: ProviderProcess, reference: str) -> None:
    async with asyncio.timeout(PATIENT):
        while not await posts(provider, reference):
            pass


# -- outcomes --------------------------------------------------------------------------------------


async def test_a_charge_is_confirmed_with_its_key_and_amount(provider: ProviderProcess) -> None:
    request = a_request()
    async with gateway_to(provider.url) as gateway:
        outcome = await gateway.charge(request, start_by=soon())
        found = await gateway.find(request.reference)
    assert isinstance(outcome, Confirmed)
    assert [(record.id, record.status) for record in found] == [(outcome.charge_id, "succeeded")]
    (line,) = [
        entry
        for entry in map(json.loads, provider.ledger_file.read_text().splitlines())
        if entry["reference"] == request.reference
    ]
    assert line["idempotency_key"] == request.reference
    assert (line["amount"], line["currency"], line["customer"]) == (1250, "EUR", "c-42")


async def test_a_decline_keeps_the_providers_reason_and_id(provider: ProviderProcess) -> None:
    request = a_request("tok_declined_no_funds")
    async with gateway_to(provider.url) as gateway:
        outcome = await gateway.charge(request, start_by=soon())
        (record,) = await gateway.find(request.reference)
    assert outcome == Declined("card_declined", record.id)
    assert record.status == "declined"


async def test_a_rejected_request_is_declined(provider: ProviderProcess) -> None:
    request = a_request("tok_invalid")
    async with gateway_to(provider.url) as gateway:
        assert await gateway.charge(request, start_by=soon()) == REJECTED
    assert await charges(provider, request.reference) == 0


def test_every_fault_has_its_row() -> None:
    assert TABLE.keys() == FAULTS.keys()


@pytest.mark.parametrize("fault", TABLE)
@pytest.mark.parametrize("connection", ["new", "reused"])
async def test_each_row_of_the_table(provider: ProviderProcess, fault: str, connection: str) -> None:
    """One POST whatever happens, and the charge is where the fault says it is."""
    times_out = TABLE[fault] == InDoubt("timeout")
    request = a_request(f"tok_fault_{fault}")
    async with gateway_to(provider.url, call_timeout=SHORT if times_out else PATIENT) as gateway:
        if connection == "reused":
            assert isinstance(await gateway.charge(a_request(), start_by=soon()), Confirmed)
        outcome = await gateway.charge(request, start_by=soon())
        after = await gateway.charge(a_request(), start_by=soon())
    assert outcome == TABLE[fault]
    assert await posts(provider, request.reference) == 1
    assert await charges(provider, request.reference) == FAULTS[fault].charges
    assert isinstance(after, Confirmed), "a fault must not spoil the next charge"


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ({"status": "declined"}, Declined("declined")),
        ({"status": "declined", "reason": 7, "id": ["x"]}, Declined("declined")),
        ({"status": "declined", "reason": "no\x00 \nfunds", "id": "ch_\x00"}, Declined("no funds")),
        ({"status": "declined", "reason": "x" * 500}, Declined("x" * 100)),
        ({"status": "declined", "reference": "r", "id": "ch_1"}, Declined("declined", "ch_1")),
        ({"status": "declined", "reference": "another"}, InDoubt("other_reference")),
        ({"status": "succeeded"}, InDoubt("unreadable_402")),
        (["declined"], InDoubt("unreadable_402")),
    ],
)
def test_a_decline_is_read_leniently_but_not_against_its_words(reply: object, outcome: ChargeOutcome) -> None:
    assert judge_body(402, json.dumps(reply).encode(), "r") == outcome


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"\xff", b"{", b"[" * 5000, b'{"id":"c","reference":"r","status":"succeeded"}x']
    + [
        json.dumps({"id": "ch_1", "reference": "r", "status": "succeeded"} | change).encode()
        for change in (
            {"id": None}, {"id": 7}, {"id": ""}, {"id": " "}, {"id": "a\n"}, {"id": "x" * 256},
            {"reference": None}, {"reference": "R"}, {"status": "SUCCEEDED"}, {"status": True},
        )
    ],
)  # fmt: skip
def test_a_201_counts_only_when_all_of_it_is_right(body: bytes) -> None:
    assert isinstance(judge_body(201, body, "r"), InDoubt)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        (" 120 ", 120.0),
        ("999999999", 3600.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
    ],
)
def test_retry_after_in_seconds_or_as_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, now=1000.0) == seconds


# -- nothing was sent ------------------------------------------------------------------------------


async def test_a_refused_connection_is_not_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with gateway_to(f"http://127.0.0.1:{port}") as gateway:
        assert await gateway.charge(a_request(), start_by=soon()) == NotSent("unreachable")
        with pytest.raises(GatewayUnavailable):
            await gateway.find("r")


async def test_an_unknown_host_is_not_sent() -> None:
    async with gateway_to("http://nowhere.invalid") as gateway:
        assert await gateway.charge(a_request(), start_by=soon()) == NotSent("dns")


async def test_a_failed_tls_handshake_is_not_sent(provider: ProviderProcess) -> None:
    async with gateway_to(provider.url.replace("http:", "https:")) as gateway:
        outcome = await gateway.charge(a_request(), start_by=soon())
    assert outcome == NotSent("tls")


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels refuse when the queue is full")
async def test_a_timeout_before_the_connection_stands_is_not_sent() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(address)
        try:
            async with gateway_to(f"http://127.0.0.1:{address[1]}", call_timeout=0.3) as gateway:
                outcome = await gateway.charge(a_request(), start_by=soon())
        finally:
            for client in waiting:
                client.close()
    assert outcome == NotSent("connect_timeout")


async def test_a_reference_that_fits_no_header_is_not_sent(provider: ProviderProcess) -> None:
    async with gateway_to(provider.url) as gateway:
        bad = [a_request(reference="a\r\nX-Evil: 1"), ChargeRequest("r", 1, "EUR", "\ud800", "tok_visa")]
        for request in bad:
            outcome = await gateway.charge(request, start_by=soon())
            assert outcome == NotSent("client_fault", alert=True)


async def test_past_start_by_nothing_is_sent(provider: ProviderProcess) -> None:
    request = a_request()
    async with gateway_to(provider.url) as gateway:
        assert await gateway.charge(request, start_by=time.monotonic()) == NotSent("too_late")
    assert await posts(provider, request.reference) == 0


@pytest.mark.parametrize("late", ["past start_by", "withdrawn", "written before"])
async def test_the_body_itself_refuses_at_the_moment_of_writing(late: str) -> None:
    """The last check: the connection stands, and still not one byte goes out, not even the head."""
    async with raw_server(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n") as (url, received):
        body = GuardedBody(b'{"pay": "me"}', start_by=time.monotonic() if late == "past start_by" else soon())
        if late == "withdrawn":
            body.withdraw()
        body.begun = late == "written before"
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientConnectionError):
                await session.post(url, data=body)
        async with asyncio.timeout(PATIENT):
            await received.ended.wait()
        assert received.content == b""
        assert body.held_back is not None


async def test_a_reply_that_came_before_the_request_is_never_read_as_its_reply() -> None:
    """A provider's stray bytes on an idle connection would be taken for the next charge's outcome."""
    good = b'{"id": "ch_1", "reference": "first", "status": "succeeded"}'
    stray = b'HTTP/1.1 402 No\r\nContent-Length: 22\r\n\r\n{"status": "declined"}'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(good), good))
        await told.wait()
        writer.write(stray)
        await writer.drain()
        sent.set()
        await over.wait()
        writer.close()

    told, sent, over = asyncio.Event(), asyncio.Event(), asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with gateway_to(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as gateway:
        assert await gateway.charge(a_request(reference="first"), start_by=soon()) == Confirmed("ch_1")
        told.set()
        await sent.wait()
        for _ in range(20):  # turns of the loop, in which the stray bytes are taken in
            await asyncio.sleep(0)
        outcome = await gateway.charge(a_request(reference="second"), start_by=soon())
        over.set()
    server.close()
    assert outcome == NotSent("connection_unclean")


# -- connections -----------------------------------------------------------------------------------


async def test_waiting_for_a_connection_ends_at_start_by(provider: ProviderProcess) -> None:
    first, second = a_request("tok_fault_silent_after_charge"), a_request()
    async with gateway_to(provider.url, connections=1) as gateway:
        holding = asyncio.create_task(gateway.charge(first, start_by=soon()))
        await until_posted(provider, first.reference)
        outcome = await gateway.charge(second, start_by=time.monotonic() + 0.2)
        assert not holding.done(), "the only connection was free: nothing was proved"
        holding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await holding
        assert isinstance(outcome, NotSent)
        # The connection is free again, and what was given up does not come after all.
        assert isinstance(await gateway.charge(a_request(), start_by=soon()), Confirmed)
    assert await posts(provider, second.reference) == 0


async def test_a_cancelled_call_sends_nothing_later(provider: ProviderProcess) -> None:
    first, second = a_request("tok_fault_silent_after_charge"), a_request()
    async with gateway_to(provider.url, connections=1, call_timeout=SHORT) as gateway:
        holding = asyncio.create_task(gateway.charge(first, start_by=soon()))
        await until_posted(provider, first.reference)
        waiting = asyncio.create_task(gateway.charge(second, start_by=soon()))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await holding == InDoubt("timeout")
        assert isinstance(await gateway.charge(a_request(), start_by=soon()), Confirmed)
    assert await posts(provider, second.reference) == 0


async def test_closing_turns_calls_in_progress_into_outcomes(provider: ProviderProcess) -> None:
    first, second = a_request("tok_fault_silent_after_charge"), a_request()
    async with gateway_to(provider.url, connections=1) as gateway:
        holding = asyncio.create_task(gateway.charge(first, start_by=soon()))
        await until_posted(provider, first.reference)
        waiting = asyncio.create_task(gateway.charge(second, start_by=soon()))
        await asyncio.sleep(0)
        await gateway.close()
        async with asyncio.timeout(PATIENT / 2):
            assert isinstance(await holding, InDoubt)
            assert isinstance(await waiting, NotSent)
        assert await gateway.charge(a_request(), start_by=soon()) == NotSent("closed")
        with pytest.raises(GatewayUnavailable):
            await gateway.find("r")
    assert await posts(provider, second.reference) == 0


async def test_more_calls_than_connections(tmp_path: Path) -> None:
    with ProviderProcess(tmp_path, latency=0.02) as provider:
        async with gateway_to(provider.url, connections=3) as gateway:
            requests = [a_request() for _ in range(30)]
            outcomes = await asyncio.gather(*[gateway.charge(each, start_by=soon()) for each in requests])
        summary = await ask(provider, "/ledger")
    assert all(isinstance(outcome, Confirmed) for outcome in outcomes)
    assert summary["posts"] == summary["succeeded"] == 30
    assert summary["most_at_once"] == 3


async def test_as_many_calls_at_once_as_connections(tmp_path: Path) -> None:
    """The library's own limit is 100: slots above it would wait inside, after our checks."""
    with ProviderProcess(tmp_path, latency=2.0) as provider:
        async with gateway_to(provider.url, connections=120) as gateway:
            requests = [a_request() for _ in range(120)]
            outcomes = await asyncio.gather(*[gateway.charge(each, start_by=soon()) for each in requests])
        summary = await ask(provider, "/ledger")
    assert all(isinstance(outcome, Confirmed) for outcome in outcomes)
    assert summary["most_at_once"] > 100


async def test_timeouts_are_not_rounded_to_whole_seconds(
    provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library rounds deadlines above 5 s up: a call would outlive its lock by up to a second."""
    loop = asyncio.get_running_loop()
    deadlines: list[float] = []
    call_at = loop.call_at

    def spy(when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        deadlines.append(when)
        return call_at(when, *args, **kwargs)

    monkeypatch.setattr(loop, "call_at", spy)
    async with gateway_to(provider.url, call_timeout=17.3) as gateway:
        began = loop.time()
        assert isinstance(await gateway.charge(a_request(), start_by=time.monotonic() + 11.3), Confirmed)
    ours = [when for when in deadlines if when - began > 5]
    assert any(17 < when - began < 18 for when in ours), "the deadline of the call was not set"
    assert any(11 < when - began < 12 for when in ours), "the wait for a connection was not bounded"
    assert not [when for when in ours if when == math.ceil(when)]


# -- questions -------------------------------------------------------------------------------------


class Received:
    """What a raw server was sent."""

    def __init__(self) -> None:
        self.content = b""
        self.ended = asyncio.Event()


@asynccontextmanager
async def raw_server(reply: bytes | None) -> AsyncIterator[tuple[str, Received]]:
    """A server that answers the first bytes of a connection with `reply` and hangs up; `None`: never."""
    received = Received()
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.content += await reader.read(65536)
        received.ended.set()
        if reply is None:
            await over.wait()
        else:
            writer.write(reply)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", received
    finally:
        over.set()
        server.close()


def http(status: str, body: bytes, *, length: int | None = None) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), length or len(body), body)


async def test_find_lists_every_charge_of_the_reference(provider: ProviderProcess) -> None:
    reference = uuid4().hex
    async with gateway_to(provider.url) as gateway:
        assert await gateway.find(reference) == []
        for token in ("tok_declined", "tok_visa", "tok_visa"):
            await gateway.charge(a_request(token, reference), start_by=soon())
        await gateway.charge(a_request(), start_by=soon())
        found = await gateway.find(reference)
    assert [record.status for record in found] == ["declined", "succeeded", "succeeded"]
    assert len({record.id for record in found}) == 3


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(http("500 Oops", b"{}"), id="500"),
        pytest.param(http("404 Not Found", b'{"charges": []}'), id="404 is no statement"),
        pytest.param(http("302 Found\r\nLocation: /charges", b'{"charges": []}'), id="redirect"),
        pytest.param(http("200 OK", b"<h1>hello</h1>"), id="html"),
        pytest.param(http("200 OK", b"{}"), id="no list"),
        pytest.param(http("200 OK", b"[]"), id="another list"),
        pytest.param(http("200 OK", b'{"charges": null}'), id="null"),
        pytest.param(http("200 OK", b'{"charges": [{"id": "ch_1"}]}'), id="no status"),
        pytest.param(http("200 OK", b'{"charges": [{"id": "", "status": "succeeded"}]}'), id="no id"),
        pytest.param(
            http("200 OK", b'{"charges": [{"id": "c", "status": "succeeded", "reference": "other"}]}'),
            id="a stranger's",
        ),
        pytest.param(http("200 OK", b'{"charges": []}', length=100), id="half"),
        pytest.param(http("200 OK", b'{"charges": []}' + b" " * 100_000), id="huge"),
        pytest.param(b"", id="hung up"),
        pytest.param(b"nonsense\r\n\r\n", id="not http"),
    ],
)
async def test_an_answer_that_cannot_be_trusted_is_no_answer(reply: bytes) -> None:
    async with raw_server(reply) as (url, received), gateway_to(url) as gateway:
        with pytest.raises(GatewayUnavailable):
            await gateway.find("r")
        assert received.content.startswith(b"GET /charges?reference=r HTTP/1.1")


async def test_a_question_ends_at_its_timeout() -> None:
    async with raw_server(None) as (url, _), gateway_to(url, call_timeout=0.3) as gateway:
        with pytest.raises(GatewayUnavailable):
            await gateway.find("r")


async def test_questions_do_not_wait_for_charges(provider: ProviderProcess) -> None:
    request = a_request("tok_fault_silent_after_charge")
    async with gateway_to(provider.url, connections=1) as gateway:
        holding = asyncio.create_task(gateway.charge(request, start_by=soon()))
        await until_posted(provider, request.reference)
        assert len(await gateway.find(request.reference)) == 1
        assert not holding.done()
        await gateway.close()
        assert isinstance(await holding, InDoubt)


# -- secrets, settings, loading --------------------------------------------------------------------


async def test_the_token_is_nowhere_but_on_the_wire(
    provider: ProviderProcess, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.get_running_loop().set_debug(True)
    caplog.set_level(logging.DEBUG)
    outcomes: list[ChargeOutcome] = []
    tokens = ["tok_visa_s3cret", "tok_declined_s3cret", "tok_invalid_s3cret", "tok_fault_s3cret"]
    async with gateway_to(provider.url) as gateway:
        for token in tokens:
            request = a_request(token)
            assert "s3cret" not in repr(request)
            outcomes.append(await gateway.charge(request, start_by=soon()))
        outcomes.append(await gateway.charge(a_request("s3cret", reference="\r\n"), start_by=soon()))
    assert "s3cret" not in repr(outcomes)
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    ("url", "call_timeout", "connections"),
    [
        ("ftp://u:s3cret@pay.example", 10.0, 1),
        ("pay.example", 10.0, 1),
        ("http://", 10.0, 1),
        ("http://u:s3cret@pay.example/?a=b", 10.0, 1),
        ("http://pay.example", 0.0, 1),
        ("http://pay.example", math.nan, 1),
        ("http://pay.example", math.inf, 1),
        ("http://pay.example", 10.0, 0),
    ],
)
def test_what_cannot_work_is_refused_at_once(url: str, call_timeout: float, connections: int) -> None:
    with pytest.raises(ValueError, match=r"must be|needed") as refused:
        HttpGateway(url, call_timeout=call_timeout, connections=connections)
    assert "s3cret" not in str(refused.value)


def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Install a package that offers gateways, as pip would leave it."""
    for number, line in enumerate(lines):
        info = tmp_path / f"offer{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: offer{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fairlane.gateways]\n{line}\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_gateway_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, "acme = workers.gateways:HttpGateway")
    gateway = load_gateway("acme", url="http://pay.example", call_timeout=10.0, connections=5)
    assert isinstance(gateway, HttpGateway)
    assert gateway.capabilities == Capabilities(deduplicates=False, can_find=True)


def test_the_http_gateway_comes_with_the_package() -> None:
    gateway = load_gateway("http", url="http://pay.example", call_timeout=10.0, connections=5)
    assert isinstance(gateway, HttpGateway)


def test_loading_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(
        tmp_path,
        monkeypatch,
        "acme = workers.gateways:HttpGateway",
        "twice = workers.gateways:HttpGateway",
        "twice = workers.gateways:load_gateway",
        "broken = workers.no_such_module:Gateway",
        "gone = workers.gateways:NoSuchName",
    )
    for name, words in {
        "nobody": "not installed; installed: acme",
        "twice": "offered twice",
        "broken": "no_such_module",
        "gone": "NoSuchName",
    }.items():
        with pytest.raises(SettingsError, match=words):
            load_gateway(name, url="http://pay.example", call_timeout=10.0, connections=5)
    with pytest.raises(SettingsError, match="call timeout"):
        load_gateway("acme", url="http://pay.example", call_timeout=-1.0, connections=5)
