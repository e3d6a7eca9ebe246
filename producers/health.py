"""Whether this process lives, and whether it could serve a purchase now."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import structlog
from fastapi import APIRouter, Request
from pydantic import BaseModel
from redis import RedisError
from sqlalchemy.exc import SQLAlchemyError

from producers.failures import describe
from producers.parts import Parts
from producers.problems import UNAVAILABLE, Problem
from shared.database import check_lanes
from shared.errors import SettingsError

log = structlog.get_logger()

router = APIRouter(tags=["health"])

#: Longer than any healthy answer by far, and shorter than the patience of those who ask (Kubernetes: 1 s, Compose: as
#: set, commonly 5 s). A part that answers later than this could not serve a crowd.
ANSWER_WITHIN: Final = 0.9

_OK: Final = "ok"


class Alive(BaseModel):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The process can serve: each part by its name."""

    status: Literal["ok"] = "ok"
    parts: dict[str, str]


@router.get("/healthz", summary="Does the process live?")
async def healthz() -> Alive:
    """Asks nobody else: a database that is down is no reason to restart this process."""
    return Alive()


@router.get("/readyz", summary="Can the process serve?")
async def readyz(request: Request) -> Ready:
    """Postgres answers and is laid out as this process expects, and Redis answers."""
    readiness: Readiness = request.app.state.readiness
    found = await readiness.ask()
    down = {part: answer for part, answer in found.items() if answer != _OK}
    if down:
        told = "; ".join(f"{part} {answer}" for part, answer in down.items())
        raise Problem(UNAVAILABLE, f"{told[:1].upper()}{told[1:]}.", parts=found)
    return Ready(parts=found)


class Readiness:
    """Asks the parts of a process, each at most once at a time, however many want to know.

    A part that hangs is not asked again until it has answered the last question, so questions cannot use up the
    connections that purchases need.
    """

    def __init__(self, parts: Parts) -> None:
        self._questions: dict[str, Callable[[], Awaitable[str]]] = {
            "postgres": lambda: _postgres(parts),
            "redis": lambda: _redis(parts),
        }
        self._asking: dict[str, asyncio.Task[str]] = {}

    async def ask(self) -> dict[str, str]:
        """What each part answers within `ANSWER_WITHIN` seconds: `ok`, or what is wrong with it."""
        tasks = {part: self._task(part) for part in self._questions}
        await asyncio.wait(tasks.values(), timeout=ANSWER_WITHIN)
        return {part: task.result() if task.done() else "does not answer" for part, task in tasks.items()}

    def _task(self, part: str) -> asyncio.Task[str]:
        task = self._asking.get(part)
        if task is None or task.done():
            task = asyncio.create_task(_tell(part, self._questions[part]), name=f"ready-{part}")
            self._asking[part] = task
        return task


async def _tell(part: str, question: Callable[[], Awaitable[str]]) -> str:
    try:
        return await question()
    except (SQLAlchemyError, RedisError, OSError) as error:
        log.warning("not_ready", part=part, **describe(error))
        return "does not answer"


async def _postgres(parts: Parts) -> str:
    async with parts.engine.connect() as connection:
        try:
            await connection.run_sync(check_lanes, parts.settings.lanes)
        except SettingsError as error:
            log.warning("not_ready", part="postgres", message=str(error))
            return "is not migrated or laid out for another number of lanes, see the log"
    return _OK


async def _redis(parts: Parts) -> str:
    await parts.redis.ping()
    return _OK
