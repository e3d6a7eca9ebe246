"""How an exception becomes an answer: every error of the API, the framework's own included, is a problem.

What an inner error says is never sent, and never logged whole either: a database error may quote the row it is about,
and rows hold payment tokens.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from typing import Any, Final

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from redis import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from producers.methods import allow, methods_of
from producers.problems import (
    CATALOGUE,
    INTERNAL_ERROR,
    MALFORMED,
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    QUEUE_FULL,
    UNAVAILABLE,
    FieldError,
    Problem,
    malformed,
    response,
)
from shared.database import is_passing
from shared.errors import QueueFullError, UnavailableError

log = structlog.get_logger()

#: An outage concerns every request, thousands a second. One line a second and kind tells as much as all of them.
_LOG_EVERY: Final = 1.0
#: A body can break a rule at every field. More than this helps nobody and would let an answer grow with the input.
_MOST_ERRORS: Final = 20


class Answers:
    """The answer to each exception. One per application: what it logs is counted together."""

    def __init__(self) -> None:
        self._quiet = _OncePerSecond()

    def to(self, error: Exception, scope: Scope) -> Response:
        """The answer to this error of this request; where nobody foresaw it, that of `internal_error`."""
        match error:
            case Problem():
                return response(error)
            case HTTPException():
                return response(_from_http(scope, error))
            case RequestValidationError():
                return response(malformed(_field_errors(error)))
            case QueueFullError():
                self._quiet.warn("queue_full", error)
                return response(Problem(QUEUE_FULL))
            case UnavailableError() | RedisError() | PoolTimeoutError():
                self._quiet.warn("part_unavailable", error)
                return response(Problem(UNAVAILABLE))
            case DBAPIError() if is_passing(error):
                self._quiet.warn("part_unavailable", error)
                return response(Problem(UNAVAILABLE))
            case _:
                return internal_error(scope, error)


#: What the framework is told to have answered; all other errors are the last resort's.
_FORESEEN: Final = (
    Problem,
    HTTPException,
    RequestValidationError,
    QueueFullError,
    UnavailableError,
    RedisError,
    PoolTimeoutError,
    DBAPIError,
)


def install(app: FastAPI, answers: Answers) -> None:
    """Make every error of this application a problem, also those of plain Starlette routes.

    Call it after every other middleware was added: the last resort goes around all of them.
    """

    async def on_error(request: Request, error: Exception) -> Response:
        return answers.to(error, request.scope)

    for kind in _FORESEEN:
        app.add_exception_handler(kind, on_error)
    app.add_middleware(LastResort)


class LastResort:
    """Answers what nobody foresaw with a 500 that says nothing of its cause; the cause goes to the log.

    It stands in for the framework's own handler of 500s, which passes the exception on to the server, whose log
    would quote it whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def sender(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, sender)
        except ClientDisconnect:
            # The client hung up before its request was whole: nothing was begun, and nobody is left to answer.
            return
        except Exception as error:  # noqa: BLE001  # whatever it is, the client gets an answer
            if started:
                raise broken_off(scope, error) from None
            await internal_error(scope, error)(scope, receive, send)


def internal_error(scope: Scope, error: Exception) -> Response:
    """The answer to an error nobody foresaw, which is logged: its kind and where it arose, not what it says."""
    log.error("internal_error", method=scope["method"], path=scope["path"], **describe(error), where=_frames(error))
    return response(Problem(INTERNAL_ERROR))


def broken_off(scope: Scope, error: Exception) -> ConnectionAbortedError:
    """What to raise when half an answer is out: only breaking the connection tells the client that it is not whole."""
    internal_error(scope, error)
    return ConnectionAbortedError("an answer was broken off")


def describe(error: BaseException) -> dict[str, str]:
    """What may be logged of an error: its type and, from the database, the state and the constraint by name."""
    known = {"error": type(error).__qualname__}
    if isinstance(error, DBAPIError):
        known["cause"] = type(error.orig).__qualname__
        details = {"sqlstate": _sqlstate(error), "constraint": _constraint(error)}
        known |= {name: value for name, value in details.items() if value}
    elif isinstance(error, RedisError | UnavailableError):
        # These texts are the server's or our own and quote no row.
        known["message"] = str(error)[:200]
    return known


class _OncePerSecond:
    """Logs a warning per event at most once a second, with the number of those passed over."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._passed_over: dict[str, int] = {}

    def warn(self, event: str, error: Exception) -> None:
        now = time.monotonic()
        if now - self._last.get(event, -_LOG_EVERY) < _LOG_EVERY:
            self._passed_over[event] = self._passed_over.get(event, 0) + 1
            return
        self._last[event] = now
        log.warning(event, passed_over=self._passed_over.pop(event, 0), **describe(error))


def _from_http(scope: Scope, error: HTTPException) -> Problem:
    if error.status_code == NOT_FOUND.status:
        return Problem(NOT_FOUND)
    if error.status_code == METHOD_NOT_ALLOWED.status:
        # The framework names the methods of the first route only, and paths have several.
        return Problem(METHOD_NOT_ALLOWED, headers={"Allow": allow(methods_of(scope))})
    if error.status_code == MALFORMED.status:
        # The framework's word for a body that its JSON parser could not even fail on in order: not UTF-8, nested too
        # deep, a number of thousands of digits.
        return malformed([FieldError("body", "is not JSON that can be read")])
    for kind in CATALOGUE.values():
        if kind.status == error.status_code:
            return Problem(kind, headers=error.headers)
    log.error("unforeseen_http_error", status=error.status_code, path=scope["path"])
    return Problem(INTERNAL_ERROR)


def _field_errors(invalid: RequestValidationError) -> list[FieldError]:
    return [_field_error(error) for error in invalid.errors()[:_MOST_ERRORS]]


def _field_error(error: Mapping[str, Any]) -> FieldError:
    place, *path = error["loc"]
    match error["type"]:
        case "json_invalid":
            return FieldError("body", f"is not JSON: {error['ctx']['error']} at character {path[0]}")
        case "missing" if not path:
            return FieldError(str(place), "is missing")
        case "missing":
            detail = "is missing"
        case "extra_forbidden":
            detail = "is not a known field"
        case "string_pattern_mismatch":
            detail = f"does not match {error['ctx']['pattern']}"
        case _:
            # The messages of the validation quote rules, not the input.
            detail = str(error["msg"]).removeprefix("Value error, ")
    name = ".".join(map(str, path)) or str(place)
    return FieldError(name[:100], detail[:300])


def _sqlstate(error: DBAPIError) -> str | None:
    state = getattr(error.orig, "sqlstate", None)
    return state if isinstance(state, str) else None


def _constraint(error: DBAPIError) -> str | None:
    name = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
    return name if isinstance(name, str) else None


def _frames(error: Exception) -> list[str]:
    """Where it arose, outermost first: the last of the frames, as `file:line function`."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
