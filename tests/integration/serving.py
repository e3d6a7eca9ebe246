"""The API served as the process serves it, but on the test's own event loop, so that a test sees who waits inside."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from producers.__main__ import Server, server_of
from producers.app import create_app
from producers.connections import Bounds
from producers.parts import Parts
from producers.protocol import BoundedProtocol
from shared.settings import Settings


@dataclass(frozen=True)
class Serving:
    """An API: its base URL, its parts, and `stop`, which ends it as SIGTERM does and returns once it has ended."""

    url: str
    parts: Parts
    _server: Server
    _task: asyncio.Task[None]

    @property
    def waiting(self) -> int:
        """How many requests and streams wait for a change."""
        return len(self.parts.hub)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._server.server_state.connections)

    @property
    def sent_ahead(self) -> int:
        """How many requests have come whose turn has not."""
        connections = cast("set[BoundedProtocol]", self._server.server_state.connections)
        return sum(len(connection.pipeline) for connection in connections)

    async def stop(self) -> None:
        self._server.should_exit = True
        await asyncio.shield(self._task)


@asynccontextmanager
async def serving(settings: Settings, *, subscribed: bool = True) -> AsyncIterator[Serving]:
    """An API on a free port of loopback, which hears what changes unless told that it cannot; stopped at the end."""
    app = create_app(settings)
    with socket.create_server(("127.0.0.1", 0), backlog=1_024) as listener:
        async with app.router.lifespan_context(app):
            parts: Parts = app.state.parts
            # Not `bounds_of`, which would change the limits of the test run.
            bounds = Bounds(1_000, 100, settings.request_within, settings.keep_alive, app.state.access_log)
            server = server_of(app, settings, bounds)
            # Not `serve`, which would take the signals of the test run.
            task = asyncio.create_task(server._serve(sockets=[listener]))
            try:
                if subscribed:
                    async with asyncio.timeout(20):
                        await parts.hub.subscribed.wait()
                yield Serving(f"http://127.0.0.1:{listener.getsockname()[1]}", parts, server, task)
            finally:
                server.should_exit = True
                await task
