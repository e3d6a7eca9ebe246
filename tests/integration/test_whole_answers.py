"""How the server sends an answer: whole and in one write where that can be, and never more or other than was meant."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from producers.connections import Bounds
from producers.protocol import BoundedProtocol

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LENGTH = (b"content-length", b"2")
CHUNKS = b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"


def sending(
    *headers: tuple[bytes, bytes], bodies: tuple[bytes, ...] = (b"ok",), then: Callable[[], Any] = int
) -> ASGIApp:
    """An application that answers 200 with these headers and these parts of a body; `then` is called between them."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
        then()
        for body in bodies[:-1]:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": bodies[-1]})

    return app


@asynccontextmanager
async def served(app: ASGIApp, written: list[bytes] | None = None) -> AsyncIterator[int]:
    """The port at which this application is served. `written` gets what is written to connections."""
    bounds = Bounds(10, 10, 5.0, 5.0, None)

    class Observed(BoundedProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if written is not None:
                write = self._way_out.write

                def observed(data: Any) -> None:
                    written.append(bytes(data))
                    write(data)

                self._way_out.write = observed  # type: ignore[method-assign]

    config = uvicorn.Config(
        app,
        http=cast("type[BoundedProtocol]", partial(Observed, bounds=bounds)),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def said(port: int, request: bytes = GET) -> bytes:
    """All that comes until the server hangs up, or for a moment."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = b""
    try:
        async with asyncio.timeout(0.5):
            while data := await reader.read(10_000):
                answer += data
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return answer


async def test_head_and_body_are_one_write() -> None:
    written: list[bytes] = []
    async with served(sending(LENGTH, (b"x-a", b"\xe9 b")), written) as port:
        answer = await said(port)
    assert answer == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-a: \xe9 b\r\n\r\nok"
    assert written == [answer]


@pytest.mark.parametrize(
    ("app", "request_line", "expected"),
    [
        pytest.param(
            sending(LENGTH, bodies=(b"o", b"k")), "GET / HTTP/1.1", b"content-length: 2\r\n\r\nok", id="parts"
        ),
        pytest.param(sending(LENGTH), "HEAD / HTTP/1.1", b"content-length: 2\r\n\r\n", id="HEAD"),
        pytest.param(sending(LENGTH), "GET / HTTP/1.0", b"content-length: 2\r\nconnection: close\r\n\r\nok", id="1.0"),
        pytest.param(
            sending(LENGTH, (b"connection", b"close")),
            "GET / HTTP/1.1",
            b"content-length: 2\r\nconnection: close\r\n\r\nok",
            id="close",
        ),
        pytest.param(sending(), "GET / HTTP/1.1", CHUNKS, id="chunks"),
    ],
)
async def test_each_kind_of_answer_is_sent_as_it_ought_to_be(app: ASGIApp, request_line: str, expected: bytes) -> None:
    async with served(app) as port:
        answer = await said(port, f"{request_line}\r\nHost: a\r\n\r\n".encode())
    assert answer == b"HTTP/1.1 200 OK\r\n" + expected


@pytest.mark.parametrize("value", [b"a\r\nx-evil: 1", b"a\nx-evil: 1", b"a\r\n\r\nevil", b"a\x00b", b"a\x7fb"])
async def test_what_may_not_be_in_a_head_is_not_sent(value: bytes) -> None:
    async with served(sending(LENGTH, (b"x-a", value))) as port:
        assert await said(port) == b""


@pytest.mark.parametrize("bodies", [(b"o",), (b"too long",), (b"o", b"verlong")])
async def test_an_answer_of_another_length_than_it_said_breaks_the_connection(bodies: tuple[bytes, ...]) -> None:
    async with served(sending(LENGTH, bodies=bodies)) as port:
        answer = await said(port, GET + GET)
    assert answer.count(b"HTTP/1.1") == 1
    assert not answer.endswith(b"ok")


async def test_a_head_without_its_answer_is_not_sent() -> None:
    def fail() -> None:
        raise RuntimeError("in the middle")

    async with served(sending(LENGTH, then=fail)) as port:
        assert await said(port, GET + GET) == b""
