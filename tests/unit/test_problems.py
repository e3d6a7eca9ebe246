from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from producers import problems
from producers.failures import LastResort, describe
from producers.problems import CATALOGUE, FieldError, Problem, ProblemType, malformed, response
from shared.database import is_passing

EVERY = [value for value in vars(problems).values() if isinstance(value, ProblemType)]


def test_every_problem_type_is_in_the_catalogue() -> None:
    assert list(CATALOGUE.values()) == sorted(EVERY, key=lambda kind: kind.status)
    assert all(slug == kind.slug for slug, kind in CATALOGUE.items())


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.slug)
def test_says_what_it_means_and_what_to_do(kind: ProblemType) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.slug)
    assert 400 <= kind.status <= 599
    assert kind.title
    assert kind.meaning.endswith(".")
    assert kind.what_to_do.endswith(".")


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.slug)
def test_retry_after_exactly_where_waiting_helps(kind: ProblemType) -> None:
    assert ("retry-after" in response(Problem(kind)).headers) == (kind.status in {429, 503})


def test_response_has_the_members_of_rfc_9457() -> None:
    answer = response(Problem(problems.SOLD_OUT, "Nothing is left of sku-1."))
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert msgspec.json.decode(answer.body) == {
        "type": "/problems/sold-out",
        "title": "Sold out",
        "status": 409,
        "detail": "Nothing is left of sku-1.",
    }


def test_a_problem_may_say_how_long_to_wait_and_carry_headers_and_members() -> None:
    answer = response(Problem(problems.RATE_LIMITED, "Slow down.", 7, {"X-Limit": "5"}, limit=5))
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["x-limit"] == "5"
    assert msgspec.json.decode(answer.body)["limit"] == 5


def test_malformed_names_every_field() -> None:
    problem = malformed([FieldError("stock", "is missing"), FieldError("price", "is missing")])
    body = msgspec.json.decode(response(problem).body)
    assert body["detail"] == "stock: is missing (and 1 more, see errors)"
    assert body["errors"] == [
        {"field": "stock", "detail": "is missing"},
        {"field": "price", "detail": "is missing"},
    ]


class FakeDriverError(Exception):
    def __init__(self, sqlstate: str | None) -> None:
        super().__init__("Failing row contains (tok_visa)")
        self.sqlstate = sqlstate


@pytest.mark.parametrize(("sqlstate", "expected"), [("57P01", True), ("08006", True), ("53300", True), ("40P01", True)])
def test_the_servers_own_trouble_passes(sqlstate: str, expected: bool) -> None:
    assert is_passing(OperationalError("SELECT", {}, FakeDriverError(sqlstate))) is expected


@pytest.mark.parametrize("sqlstate", ["23514", "22003", "42P01"])
def test_a_statement_at_fault_does_not_pass(sqlstate: str) -> None:
    assert not is_passing(IntegrityError("INSERT", {}, FakeDriverError(sqlstate)))


def test_what_is_logged_of_a_database_error_quotes_no_row() -> None:
    error = IntegrityError("INSERT", {"payment_token": "tok_visa"}, FakeDriverError("23514"))
    logged = describe(error)
    assert logged == {"error": "IntegrityError", "cause": "FakeDriverError", "sqlstate": "23514"}


def test_only_this_catalogue_makes_problem_types() -> None:
    package = Path(problems.__file__).parent
    makers = [path.name for path in package.glob("*.py") if re.search(r"\bProblemType\(", path.read_text())]
    assert makers == ["problems.py"]


SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/"}


async def receive() -> Message:
    return {"type": "http.request"}


async def test_the_last_resort_answers_and_logs_without_what_the_error_says() -> None:
    sent: list[Message] = []

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("tok_visa")

    async def send(message: Message) -> None:
        sent.append(message)

    with capture_logs() as logs:
        await LastResort(broken)(SCOPE, receive, send)
    assert sent[0]["status"] == 500
    assert msgspec.json.decode(sent[1]["body"])["type"] == "/problems/internal-error"
    assert [entry["error"] for entry in logs] == ["KeyError"]
    assert logs[0]["where"][-1].endswith(" broken")
    assert "tok_visa" not in f"{sent} {logs}"


async def test_the_last_resort_breaks_off_an_answer_that_has_begun() -> None:
    sent: list[Message] = []

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("tok_visa")

    async def send(message: Message) -> None:
        sent.append(message)

    with capture_logs(), pytest.raises(ConnectionAbortedError) as raised:
        await LastResort(broken)(SCOPE, receive, send)
    assert raised.value.__suppress_context__
    assert len(sent) == 1
