"""The API process, put together: routes, limits, errors, documentation and the parts they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Final

from fastapi import FastAPI
from fastapi.routing import APIRoute

from producers import docs, failures, health, items, metrics, pages, purchases, purchases_described, watching
from producers.health import Readiness
from producers.limits import BodyLimits
from producers.openapi import describe
from producers.parts import open_parts
from shared.settings import Settings

_DESCRIPTION: Final = """
Sells limited stock to a crowd: a purchase is accepted once, decided in order, and charged once.

Send an API key as `Authorization: Bearer <key>`. Amounts are in minor units. Every error is a
[problem](/problems): JSON with `type`, `title`, `status` and `detail`.
"""

_TAGS: Final = [
    {"name": "purchases", "description": "Buy, and see how a purchase stands."},
    {"name": "items", "description": "What is sold."},
    {"name": "health", "description": "For those who run the process. No API key is needed."},
]


def create_app(settings: Settings) -> FastAPI:
    """The application. Its parts are opened when it starts and closed when it ends.

    Raises SettingsError at start, not here, when the database is not what the settings say.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_parts(settings) as parts:
            app.state.parts = parts
            app.state.readiness = Readiness(parts)
            yield

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
    app.router.routes[:0] = [*purchases.routes, *watching.routes]
    app.include_router(items.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.router.routes.extend([*pages.routes, *docs.routes])
    describe(app, purchases_described.PATHS, purchases_described.SCHEMAS)
    app.add_middleware(BodyLimits)
    failures.install(app)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name
