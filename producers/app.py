"""The API process, put together: routes, limits, errors, documentation and the parts they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Final

from fastapi import FastAPI
from fastapi.routing import APIRoute

from producers import (
    cancelling,
    docs,
    failures,
    health,
    items,
    metrics,
    pages,
    public_status,
    purchases,
    purchases_described,
    rates,
    watching,
    watching_described,
)
from producers.access_log import AccessLog
from producers.cors import Cors
from producers.every_answer import EveryAnswer
from producers.failures import Answers
from producers.fields import Fields
from producers.front import CrowdRoute, Front
from producers.health import Readiness
from producers.limits import BodyLimits
from producers.methods import Methods
from producers.openapi import describe
from producers.parts import open_parts
from shared.settings import Settings

_DESCRIPTION: Final = """
Sells limited stock to a crowd: a purchase is accepted once, decided in order, and charged once.

Send an API key as `Authorization: Bearer <key>`. Amounts are in minor units. Every error is a
[problem](/problems): JSON with `type`, `title`, `status` and `detail`.

Every path also takes OPTIONS, which names its methods, and every GET can be asked as HEAD.
"""

_TAGS: Final = [
    {"name": "purchases", "description": "Buy, and see how a purchase stands."},
    {"name": "status", "description": "For the buyer's browser. No API key is needed: the id is the capability."},
    {"name": "items", "description": "What is sold."},
    {"name": "health", "description": "For those who run the process. No API key is needed."},
]


def create_app(settings: Settings) -> FastAPI:
    """The application; `state.front` is how the server calls it. Its parts are opened when it starts and closed when it
    ends.

    Raises SettingsError at start, not here, when the database is not what the settings say.
    """

    access_log = AccessLog() if settings.access_log else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with open_parts(settings) as parts:
                app.state.parts = parts
                app.state.readiness = Readiness(parts)
                yield
        finally:
            if access_log is not None:
                access_log.end()

    app = FastAPI(
        title="Fairlane",
        version=version("fairlane"),
        description=_DESCRIPTION.strip(),
        license_info={"name": "MIT"},
        openapi_tags=_TAGS,
        docs_url=None,
        redoc_url=None,
        # A path has one spelling. Answering another with a redirect would make clients send purchases twice.
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        lifespan=lifespan,
    )
    # Routes are tried in this order, so those that a crowd asks for come first.
    app.router.routes[:0] = [*purchases.routes, *watching.routes, *public_status.routes, *cancelling.routes]
    app.include_router(items.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.router.routes.extend([*pages.routes, *docs.routes])
    describe(
        app,
        purchases_described.PATHS | watching_described.PATHS,
        purchases_described.SCHEMAS | watching_described.SCHEMAS,
    )
    app.add_middleware(Methods)
    app.add_middleware(BodyLimits)
    cors = Cors(settings.cors_origins)
    app.add_middleware(Fields, add=cors.add_fields)
    answers = Answers()
    failures.install(app, answers)
    # Around the last resort too: its answers are answers.
    app.add_middleware(EveryAnswer, access_log=access_log)
    app.state.access_log = access_log
    app.state.front = Front(
        app,
        [
            CrowdRoute(watching.show_route, "GET"),
            CrowdRoute(purchases.buy_route, "POST", *([rates.add_fields] if rates.limits_of(settings) else [])),
            CrowdRoute(public_status.show_route, "GET", cors.add_fields),
        ],
        answers,
        access_log,
    )
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name
