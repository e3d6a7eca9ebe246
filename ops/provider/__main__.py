"""`python -m ops.provider`: serve until Ctrl-C, SIGTERM, or (with `--owned`) until the starter is gone."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
from pathlib import Path

import uvloop
from aiohttp import web

from ops.provider.app import Provider
from ops.provider.ledger import Ledger, LedgerError

#: Seconds calls in progress get to end when the provider stops. A call takes `--latency`; silent ones never
#: end.
STOP_WITHIN = 1.0


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(text)
    return value


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ops.provider", description="The sandbox payment provider.")
    parser.add_argument("--ledger", type=Path, required=True, help="file of charges; made if missing, added to")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default 0: any free one)")
    parser.add_argument("--port-file", type=Path, help="file the port is written to once calls are answered")
    parser.add_argument("--latency", type=_seconds, default=0.05, help="seconds a charge takes (default 0.05)")
    parser.add_argument("--owned", action="store_true", help="stop when standard input ends: the starter died")
    return parser


def _watch_starter(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        stop.set()


async def _serve(options: argparse.Namespace, ledger: Ledger) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if options.owned:
        loop.add_reader(sys.stdin.fileno(), _watch_starter, loop, stop)
    provider = Provider(ledger, latency=options.latency)
    # Without the access log: a sale makes thousands of calls, and the ledger has them all.
    runner = web.AppRunner(provider.app(), access_log=None, shutdown_timeout=STOP_WITHIN)
    await runner.setup()
    try:
        await web.TCPSite(runner, options.host, options.port, backlog=1024).start()
        host, port = runner.addresses[0][:2]
        if options.port_file is not None:
            part = options.port_file.with_suffix(".part")
            part.write_text(str(port))
            part.replace(options.port_file)
        print(f"sandbox provider listening on http://{host}:{port}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> int:
    """Run the command. Returns its exit code: 0 after an orderly stop, 1 with one line when it cannot run."""
    options = _options().parse_args()
    try:
        ledger = Ledger(options.ledger)
    except (LedgerError, OSError) as error:
        print(f"sandbox provider: {error}", file=sys.stderr)
        return 1
    try:
        uvloop.run(_serve(options, ledger))
    except OSError as error:
        print(f"sandbox provider: cannot listen on {options.host}:{options.port}: {error}", file=sys.stderr)
        return 1
    finally:
        ledger.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
