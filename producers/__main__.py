"""`python -m producers`: the API process. Serves until SIGTERM or Ctrl-C, then finishes what it has begun."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from typing import Final

import structlog
import uvicorn
import uvloop
from sqlalchemy.exc import SQLAlchemyError

from producers.app import create_app
from shared.crash_points import arm_from_environment
from shared.errors import SettingsError
from shared.logs import configure_logging
from shared.settings import Settings, settings_or_exit

log = structlog.get_logger()

#: Connections that wait to be taken up. A crowd arrives at once; the kernel's own limit (4,096) is the next.
_BACKLOG: Final = 4_096
#: Idle connections are kept longer than load balancers keep theirs (60 s as a rule), so that none sends a request
#: into a connection that is just being closed.
_KEEP_ALIVE: Final = 65
#: At the end, requests under way get this long: a commit takes milliseconds, and process runners kill after 10 s or
#: more.
_GRACE: Final = 8


def main() -> int:
    """Run the process. Returns its exit code: 0 after an orderly stop, 1 with one line when it cannot run."""
    settings = settings_or_exit("api_keys")
    configure_logging()
    arm_from_environment()
    try:
        listener = _listen(settings.host, settings.port)
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


async def _serve(settings: Settings, listener: socket.socket) -> None:
    app = create_app(settings)
    # The parts are opened here and not by the server, which would report an error at start as a traceback.
    async with app.router.lifespan_context(app):
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_GRACE,
            )
        )
        # The server catches these signals, stops, and then sends them again to whoever caught them before. That is
        # nobody: by then they have done their work, and the parts are still to be closed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        host, port = listener.getsockname()[:2]
        log.info("api_listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await server.serve(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def _refuse(line: str) -> int:
    print(f"fairlane: {line}", file=sys.stderr)  # noqa: T201  # the one line a process ends with
    return 1


if __name__ == "__main__":
    sys.exit(main())
