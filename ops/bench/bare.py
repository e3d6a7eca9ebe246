"""The limit of the door: a bare 202 from plain Starlette, by the same server with the same flags.

It reads a purchase's body and answers with one of the same size. It checks nothing and keeps nothing.
`python -m ops.bench.bare PORT` serves until its standard input ends: its starter is gone.
"""

from __future__ import annotations

import os
import sys
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ops.embedded.ports import LOOPBACK

_ANSWER = (
    b'{"id":"0123456789abcdef0123456789abcdef","status":"queued","reason":null,"item":"hot","quantity":1,'
    b'"customer":"c-0123456789ab-1234","amount":2500,"currency":"EUR","charge_id":null,"position":null,'
    b'"accepted_at":"2026-01-31T09:00:00.000000Z","decided_at":null,"finished_at":null}'
)


async def accept(request: Request) -> Response:
    """202, whatever was asked for."""
    await request.body()
    return Response(_ANSWER, status_code=202, media_type="application/json")


def main() -> None:
    """Serve, as `producers.__main__` does: httptools, uvloop, no access log, one process."""
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    app = Starlette(routes=[Route("/v1/purchases", accept, methods=["POST"])])
    uvicorn.run(
        app,
        host=LOOPBACK,
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


def _end_with_the_starter() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
