"""What the crowd's way does with a request, whatever becomes of it. The tests of the API go through it as well."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message
from structlog.testing import capture_logs

from producers.failures import Answers
from producers.front import CrowdRoute, Front
from producers.limits import whole_body


async def handle(request: Request) -> Response:
    """Answers with the body; raises an error if that says so."""
    if await whole_body(request.receive) == b'"raise"':
        raise KeyError("tok_visa")
    return Response(b"well", headers={"X-Value": request.path_params["value"]})


class Exchange:
    """One request to the front, and what became of it."""

    def __init__(self, body: bytes = b"", method: str = "POST", **scope: Any) -> None:
        self.sent: list[Message] = []
        self.logged: list[tuple[int | None, int]] = []
        #: The number of the message that cannot be sent.
        self.breaks_at: int | None = None
        self.received: Message = {"type": "http.request", "body": body}
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        self.scope = {"type": "http", "method": method, "path": "/buy/3", "headers": headers, "state": {}} | scope

    async def run(self) -> None:
        route = CrowdRoute(Route("/buy/{value}", handle, methods=["POST"]), "POST", lambda _, head: self._mark(head))
        await Front(FastAPI(), [route], Answers(), self)(self.scope, self._receive, self._send)  # type: ignore[arg-type]

    def add(self, scope: Any, status: int | None, seconds: float, size: int) -> None:
        """What the access log is told."""
        self.logged.append((status, size))

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def fields(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    def _mark(self, head: Any) -> None:
        head["X-Marked"] = "yes"

    async def _receive(self) -> Message:
        return self.received

    async def _send(self, message: Message) -> None:
        if len(self.sent) == self.breaks_at:
            raise KeyError("tok_visa")
        self.sent.append(message)


async def test_an_answer_has_what_every_answer_has() -> None:
    exchange = Exchange(b'"buy"')
    await exchange.run()
    assert exchange.status == 200
    assert exchange.sent[1]["body"] == b"well"
    assert exchange.fields[b"x-value"] == b"3"
    assert exchange.fields[b"x-marked"] == b"yes"
    assert exchange.fields[b"cache-control"] == b"no-store"
    assert exchange.fields[b"x-request-id"].decode() == exchange.scope["state"]["request_id"]
    assert exchange.logged == [(200, 4)]


async def test_an_error_that_nobody_foresaw_is_answered_and_not_quoted() -> None:
    exchange = Exchange(b'"raise"')
    with capture_logs() as logs:
        await exchange.run()
    assert exchange.status == 500
    assert msgspec.json.decode(exchange.sent[1]["body"])["type"] == "/problems/internal-error"
    assert {b"x-marked", b"x-request-id", b"content-security-policy"} <= exchange.fields.keys()
    assert [entry["error"] for entry in logs] == ["KeyError"]
    assert "tok_visa" not in f"{exchange.sent} {logs}"
    assert exchange.logged == [(500, len(exchange.sent[1]["body"]))]


async def test_a_body_that_is_not_taken_is_answered_as_everywhere() -> None:
    exchange = Exchange(b'"buy"', headers=[(b"content-length", b"99999")])
    await exchange.run()
    assert exchange.status == 413
    assert exchange.fields[b"x-marked"] == b"yes"
    assert len(exchange.logged) == 1


@pytest.mark.parametrize("breaks_at", [0, 1])
async def test_an_answer_that_cannot_be_sent_breaks_the_connection(breaks_at: int) -> None:
    exchange = Exchange(b'"buy"')
    exchange.breaks_at = breaks_at
    with capture_logs() as logs, pytest.raises(ConnectionAbortedError) as raised:
        await exchange.run()
    assert raised.value.__suppress_context__
    assert len(exchange.sent) == breaks_at
    assert [entry["error"] for entry in logs] == ["KeyError"]
    assert "tok_visa" not in f"{logs}"


async def test_who_hangs_up_before_the_end_of_its_body_is_answered_nothing() -> None:
    exchange = Exchange(b'"buy"')
    exchange.received = {"type": "http.disconnect"}
    with capture_logs() as logs:
        await exchange.run()
    assert exchange.sent == logs == []
    assert exchange.logged == [(None, 0)]


@pytest.mark.parametrize("other", [{"method": "PUT"}, {"path": "/buy"}, {"path": "/buy/3/4"}, {"root_path": "/api"}])
async def test_other_requests_go_through_the_framework(other: dict[str, Any]) -> None:
    exchange = Exchange(b'"buy"', **({"root_path": "", "query_string": b""} | other))
    await exchange.run()
    # The framework has no routes here, and none of what is put around it in `producers.app`.
    assert exchange.status == 404
    assert exchange.logged == []
