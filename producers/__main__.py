"""`python -m producers`: the API process. Serves until SIGTERM or Ctrl-C, then finishes what it has begun."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from functools import partial
from typing import Final, cast

import structlog
import uvicorn
import uvloop
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from producers.app import create_app
from producers.connections import BACKLOG, Bounds, bounds_of, listen
from producers.protocol import BoundedProtocol
from producers.waiting import Hub
from shared.crash_points import arm_from_environment
from shared.errors import SettingsError
from shared.garbage import spare_what_is_here
from shared.logs import configure_logging
from shared.settings import Settings, settings_or_exit

log = structlog.get_logger()

#: At the end, requests under way get this long: a commit takes milliseconds, and process runners kill after 10 s or
#: more.
_GRACE: Final = 8


def main() -> int:
    """Run the process. Returns its exit code: 0 after an orderly stop, 1 with one line when it cannot run."""
    settings = settings_or_exit("api_keys")
    configure_logging()
    arm_from_environment()
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        return _refuse(f"FAIRLANE_HOST, FAIRLANE_PORT: cannot listen on {settings.host}:{settings.port} ({error})")
    try:
        with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, listener))
    except SettingsError as error:
        return _refuse(str(error))
    except SQLAlchemyError as error:
        # Its text may quote a statement. Its kind is enough, and the setting to look at.
        return _refuse(f"FAIRLANE_DATABASE_URL: the database does not answer ({type(error).__name__})")
    except KeyboardInterrupt:
        return 130
    return 0


class Server(uvicorn.Server):
    """Lets go, when it is to stop, of those who wait for a change: they would use the grace period up."""

    def __init__(self, config: uvicorn.Config, hub: Hub) -> None:
        super().__init__(config)
        self._hub = hub

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._hub.release()
        await super().shutdown(sockets)


def server_of(app: FastAPI, settings: Settings, bounds: Bounds) -> Server:
    """The server of this application, whose parts are open."""
    config = uvicorn.Config(
        app.state.front,
        # The server calls it with its own arguments, as it would the class.
        http=cast("type[BoundedProtocol]", partial(BoundedProtocol, bounds=bounds)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # a timer of the loop takes any
        timeout_graceful_shutdown=_GRACE,
    )
    return Server(config, app.state.parts.hub)


async def _serve(settings: Settings, listener: socket.socket) -> None:
    app = create_app(settings)
    bounds = bounds_of(settings, app.state.access_log)
    # The parts are opened here and not by the server, which would report an error at start as a traceback.
    async with app.router.lifespan_context(app):
        server = server_of(app, settings, bounds)
        spare_what_is_here()
        # The server catches these signals, stops, and then sends them again to whoever caught them before. That is
        # nobody: by then they have done their work, and the parts are still to be closed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        if (key_file := app.state.parts.key_file) is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, key_file.look_now)
        host, port = listener.getsockname()[:2]
        log.info("api_listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await server.serve(sockets=[listener])


def _refuse(line: str) -> int:
    print(f"fairlane: {line}", file=sys.stderr)  # noqa: T201  # the one line a process ends with
    return 1


if __name__ == "__main__":
    sys.exit(main())
