"""The demo from beginning to end."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from uuid import UUID

import msgspec
import uvloop
from rich.console import Console
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from ops.audit import audit
from ops.audit_report import print_report
from ops.catalogue import Line, import_catalogue, read_catalogue
from ops.demo.buying import Crowd
from ops.demo.crowd import CATALOGUE, HOT, hot_units_to_sell, plan_crowd
from ops.demo.live import open_view, take_snapshot
from ops.demo.locked_way import sell_with_a_lock
from ops.demo.report import Outcome, print_outcome
from ops.demo.stage import Stage, StageError
from ops.interruption import orderly_end
from shared.database import make_async_engine
from shared.errors import FairlaneError

#: Everybody has an answer within some ten seconds, or twenty on a busy machine. Whoever has none by now stops asking.
_SALE_WITHIN = 40.0
#: Then what was accepted gets this long to come to its end; after that it counts as lost.
_SETTLED_WITHIN = 10.0
_SNAPSHOT_EVERY = 0.25
_KEEP_LOOK_EVERY = 0.5

_STATUSES = text("SELECT id, status FROM fairlane.purchases WHERE id = ANY(CAST(:ids AS uuid[]))")
_OPEN = text("SELECT EXISTS (SELECT FROM fairlane.purchases WHERE finished_at IS NULL)")
_HOT_SECONDS = text("""
SELECT coalesce(extract(epoch FROM max(finished_at) FILTER (WHERE status = 'confirmed') - min(accepted_at)), 0)
FROM fairlane.purchases WHERE item = :sku
""")


def run_demo(*, buyers: int, seed: int, keep: bool, plain: bool) -> int:
    """Run a sale; returns 0, 1 when an invariant broke or a process ended, 130 after Ctrl-C, 143 after SIGTERM.

    `plain` prints lines instead of the live view. With `keep` everything stays up until Ctrl-C.
    """
    console = Console(highlight=False, soft_wrap=True)
    with orderly_end() as interruption:
        try:
            console.print("Starting Postgres, Valkey, a payment provider and every process of the Procfile …")
            began = time.monotonic()
            with Stage() as stage:
                console.print(f"Up after {time.monotonic() - began:.1f} s.")
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    code = runner.run(_sale(stage, console, buyers, seed, plain))
                if keep:
                    _keep(stage, console)
                console.print("Stopping everything …")
                return code
        except StageError as error:
            print(f"fairlane: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            console.print("Stopped; nothing is left running.")
            return interruption.code


async def _sale(stage: Stage, console: Console, buyers: int, seed: int, plain: bool) -> int:
    settings = stage.settings
    lines = _catalogue()
    imported = await import_catalogue(lines, settings)
    console.print(f"Imported {imported.created} items from {CATALOGUE.name}. {buyers} buyers come (seed {seed}).")
    plan = plan_crowd(lines, buyers, seed)
    crowd = Crowd(stage.api, stage.secrets["shop"], plan)
    engine = make_async_engine(settings)
    try:
        await _watch(stage, crowd, engine, console, plain)
        await _settle(engine)
        statuses, hot_seconds = await _recorded(engine, crowd)
    finally:
        await engine.dispose()
    report = await audit(settings)
    print_report(report, console)
    console.print("Now five seconds of the other way: a Redis lock per item around read, pay, decrement …")
    ledger = _ledger(settings.payment_url or "")
    stock = next(line.terms.stock for line in lines if line.sku == HOT)
    stop = threading.Event()
    try:
        locked = await asyncio.to_thread(sell_with_a_lock, settings.redis_url, settings.payment_url or "", stock, stop)
    finally:
        stop.set()
    stage.check()
    outcome = Outcome(
        crowd=crowd,
        audit=report,
        statuses=statuses,
        charged_twice=ledger,
        hot_stock=stock,
        hot_expected=hot_units_to_sell(plan, stock),
        hot_seconds=hot_seconds,
    )
    print_outcome(console, outcome, locked)
    return 1 if outcome.broken() else 0


def _catalogue() -> tuple[Line, ...]:
    catalogue = read_catalogue(CATALOGUE)
    if catalogue.bad:
        raise FairlaneError(f"{CATALOGUE}: {catalogue.bad[0]}")
    return catalogue.lines


async def _watch(stage: Stage, crowd: Crowd, engine: AsyncEngine, console: Console, plain: bool) -> None:
    """Show the sale until the crowd is done. Raises StageError when a process ends under it."""
    await take_snapshot(engine, crowd.tally, len(crowd.visits), 0.0)  # The first one connects, which takes a moment.
    buying = asyncio.create_task(crowd.run(_SALE_WITHIN))
    began = time.monotonic()
    try:
        with open_view(console, plain=plain, lanes=stage.settings.lanes) as view:
            while not buying.done():
                stage.check()
                seconds = time.monotonic() - began
                view.show(await take_snapshot(engine, crowd.tally, len(crowd.visits), seconds))
                await asyncio.wait({buying}, timeout=_SNAPSHOT_EVERY)
            view.show(await take_snapshot(engine, crowd.tally, len(crowd.visits), time.monotonic() - began))
        await buying
    finally:
        buying.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await buying


async def _settle(engine: AsyncEngine) -> None:
    """Wait, a bounded time, until every purchase is at its end, also those whose buyer stopped asking."""
    deadline = time.monotonic() + _SETTLED_WITHIN
    while time.monotonic() < deadline:
        async with engine.begin() as connection:
            if not (await connection.execute(_OPEN)).scalar_one():
                return
        await asyncio.sleep(_SNAPSHOT_EVERY)


async def _recorded(engine: AsyncEngine, crowd: Crowd) -> tuple[Mapping[str, str], float]:
    """The state on record of every purchase that buyers were told of, and how long the hot item's sale took."""
    ids = [UUID(purchase) for visit in crowd.visits for purchase in visit.ids]
    async with engine.begin() as connection:
        rows = (await connection.execute(_STATUSES, {"ids": ids})).mappings().all()
        seconds = (await connection.execute(_HOT_SECONDS, {"sku": HOT})).scalar_one()
    return {row["id"].hex: row["status"] for row in rows}, float(seconds)


def _ledger(payment_url: str) -> list[str]:
    """What the provider's own ledger counts as charged twice."""
    with urllib.request.urlopen(f"{payment_url}/ledger", timeout=10) as response:  # noqa: S310 - our own sandbox
        return list(msgspec.json.decode(response.read())["charged_twice"])


def _keep(stage: Stage, console: Console) -> None:
    user, _, password = stage.flower_login.partition(":")
    console.print(
        f"\nEverything stays up until Ctrl-C.\n  API docs  {stage.api}/docs\n"
        f"  API keys  shop {stage.secrets['shop']}, admin {stage.secrets['admin']}\n"
        f"  Flower    {stage.flower}  user {user}, password {password}\n  log       {stage.log}",
        markup=False,
    )
    while True:
        stage.check()
        time.sleep(_KEEP_LOOK_EVERY)
