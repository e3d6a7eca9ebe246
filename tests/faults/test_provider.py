"""The payment provider failing in every way it can: one charge for whoever is confirmed, none for anybody else.

The provider makes a new charge at every POST. So its books show every call that should not have been made.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest

from ops.audit import audit
from shared.states import FINAL
from tests.acceptance.shop import Shop
from tests.faults.crowd import crowd
from tests.faults.floor import Floor, open_floor
from tests.faults.sale import PLENTY, sale, until

#: With it, "not found" counts 6 s after the claim: later than the books that are shown late, and long after a provider
#: that was frozen for longer than a call goes on.
SETTLE_WINDOW = 3
#: Longer than CALL_TIMEOUT, 1.5 s.
FROZEN = 2.5
#: Two attempts that nobody hears of again take 14 s at least.
SETTLED_WITHIN = 60.0


@pytest.fixture(scope="module")
def _floor_of_its_own(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Floor]:
    directory = tmp_path_factory.mktemp("provider")
    with open_floor(
        directory,
        project_root / "Procfile",
        FAIRLANE_SETTLE_WINDOW=str(SETTLE_WINDOW),
        FAIRLANE_NEVER_CHARGED_LIMIT="2",  # enough to see the last attempt end
    ) as opened:
        yield opened


@pytest.fixture
def floor(_floor_of_its_own: Floor) -> Iterator[Floor]:
    """Not the shared one: the last test leaves charges on its provider's books that no audit lets pass."""
    _floor_of_its_own.restore()
    yield _floor_of_its_own
    _floor_of_its_own.restore()


@pytest.fixture
async def shop(floor: Floor) -> AsyncIterator[Shop]:
    async with aiohttp.ClientSession() as session:
        yield Shop(session, floor.url)


@dataclass(frozen=True)
class End:
    """What became of one purchase: its state, what was recorded of its attempts, and what the provider saw of it.

    Attempts that were not sent are left out: on a busy machine one may be claimed and come too late.
    """

    status: str
    attempts: tuple[str, ...]
    posts: int
    charges: int
    reason: str | None = None


#: The provider charged, and said so to nobody: it is asked, and not called again.
FOUND = End("confirmed", ("confirmed",), posts=1, charges=1)
#: It did not charge, and nobody knew: asked late enough, it is called once more.
CALLED_AGAIN = End("confirmed", ("not_charged", "confirmed"), posts=2, charges=1)
#: It said that it had done nothing.
TRIED_AGAIN = End("confirmed", ("confirmed",), posts=2, charges=1)

#: By payment token, how a buyer with it must end.
PAID = {
    "tok_visa": FOUND,
    "tok_fault_slow": FOUND,
    "tok_fault_silent_after_charge": FOUND,
    "tok_fault_reset_after_charge": FOUND,
    "tok_fault_reset_and_shown_late": FOUND,
    "tok_fault_hang_up_after_charge": FOUND,
    "tok_fault_half_reply": FOUND,
    "tok_fault_stalled_reply": FOUND,
    "tok_fault_500_after_charge": FOUND,
    "tok_fault_redirect_after_charge": FOUND,
    "tok_fault_html_201": FOUND,
    "tok_fault_pending_201": FOUND,
    "tok_fault_other_reference_201": FOUND,
    "tok_fault_unsafe_id_201": FOUND,
    "tok_fault_succeeded_402": FOUND,
    "tok_fault_empty_204": FOUND,
    "tok_fault_once_silent_before_charge": CALLED_AGAIN,
    "tok_fault_once_reset_before_charge": CALLED_AGAIN,
    "tok_fault_once_hang_up_before_charge": CALLED_AGAIN,
    "tok_fault_once_500_before_charge": CALLED_AGAIN,
    "tok_fault_once_503_before_charge": CALLED_AGAIN,
    "tok_fault_once_redirect_before_charge": CALLED_AGAIN,
    "tok_fault_once_html_402": CALLED_AGAIN,
    "tok_fault_once_429": TRIED_AGAIN,
}
UNPAID = {
    "tok_declined": End("declined", ("declined",), posts=1, charges=0, reason="card_declined"),
    "tok_invalid": End("declined", ("declined",), posts=1, charges=0, reason="provider_rejected"),
    "tok_fault_400": End("declined", ("declined",), posts=1, charges=0, reason="provider_rejected"),
    # Nobody answers for it, twice: it is given up, and its stock goes to somebody else.
    "tok_fault_500_before_charge": End(
        "declined", ("not_charged", "not_charged"), posts=2, charges=0, reason="not_charged"
    ),
}


def books(floor: Floor, page: str) -> dict[str, object]:
    """A page of the provider's, as JSON."""
    with urllib.request.urlopen(f"{floor.provider.url}{page}", timeout=5) as reply:  # noqa: S310  # the floor's own
        answer: dict[str, object] = json.load(reply)
        return answer


def ends(floor: Floor, bought: dict[str, str]) -> dict[str, End]:
    """How the purchases of these tokens stand."""
    rows = {
        row["id"]: row
        for row in floor.rows(
            "SELECT replace(p.id::text, '-', '') AS id, p.status, p.reason,"
            " array_agg(a.outcome ORDER BY a.attempt) FILTER (WHERE a.outcome <> 'not_sent') AS attempts"
            " FROM fairlane.purchases p JOIN fairlane.charge_attempts a ON a.purchase_id = p.id"
            " WHERE p.id = ANY(%s::uuid[]) GROUP BY p.id",
            list(bought.values()),
        )
    }
    charged = Counter(charge["reference"] for charge in floor.service.ledger(*rows) if charge["status"] == "succeeded")
    return {
        token: End(
            rows[id]["status"],
            tuple(rows[id]["attempts"]),
            posts=int(str(books(floor, f"/ledger/posts?reference={id}")["posts"])),
            charges=charged[id],
            reason=rows[id]["reason"],
        )
        for token, id in bought.items()
    }


async def test_every_way_to_fail_has_its_end(floor: Floor, shop: Shop, sku: str) -> None:
    refused = f"{sku}-refused"
    floor.put_item(sku, PLENTY)
    floor.put_item(refused, PLENTY)
    bought: dict[str, str] = {}
    # Others pay meanwhile, more than fail: the circuit breaker has no reason to open.
    async with crowd(floor.url, [sku], rate=20) as buyers:
        for token in [*PAID, *UNPAID]:
            reply = await shop.buy(sku if token in PAID else refused, token=token)
            assert reply.status == 202, reply.body
            bought[token] = reply.body["id"]
            await asyncio.sleep(0.1)  # so that the others are more
        await until(
            lambda: set(floor.statuses(refused)) <= FINAL and "in_doubt" not in floor.statuses(sku),
            "an end for everybody",
            SETTLED_WITHIN,
        )
    await floor.ends_well(buyers)
    found, wanted = ends(floor, bought), PAID | UNPAID
    assert {token: end for token, end in found.items() if end != wanted[token]} == {}
    late = books(floor, f"/ledger/posts?reference={bought['tok_fault_reset_and_shown_late']}")
    assert int(str(late["asked_too_early"])) >= 1, "it was not asked before its books showed the charge"


async def test_killed_and_started_again(floor: Floor, sku: str) -> None:
    """Those under way are in doubt, the others were not sent; orders are accepted and decided as ever."""
    async with sale(floor, sku):
        await asyncio.to_thread(floor.provider.kill)
        await until(lambda: attempts(floor, sku)["not_sent"] >= 5, "calls that could not be sent")
        reserved = floor.statuses(sku)["reserved"]
        await until(lambda: floor.statuses(sku)["reserved"] >= reserved + 20, "orders that are decided")
        await asyncio.to_thread(floor.provider.start)


def attempts(floor: Floor, sku: str) -> Counter[str]:
    """How many attempts to charge for this item had each outcome so far."""
    rows = floor.rows(
        "SELECT outcome, count(*) AS n FROM fairlane.charge_attempts JOIN fairlane.purchases ON id = purchase_id"
        " WHERE item = %s AND outcome IS NOT NULL GROUP BY outcome",
        sku,
    )
    return Counter({row["outcome"]: row["n"] for row in rows})


def everybody_gets(floor: Floor, status: int, seconds: float) -> None:
    """The provider answers so, whoever asks and whatever."""
    body = json.dumps({"status": status, "seconds": seconds}).encode()
    with urllib.request.urlopen(f"{floor.provider.url}/faults", data=body, timeout=5) as reply:  # noqa: S310
        assert reply.status == 200


async def test_a_wrong_key_for_a_while(floor: Floor, sku: str) -> None:
    """The breaker opens: the provider is hardly called, nobody loses a hold, and all is paid for in the end."""
    async with sale(floor, sku), AsyncExitStack() as stack:
        stack.callback(everybody_gets, floor, 401, 0)  # whatever becomes of this test: others come after it
        charges = floor.processes["charges"]
        said = len(charges.logs())
        everybody_gets(floor, 401, 600)
        await until(lambda: "claims_paused" in charges.logs()[said:], "a breaker that opens")
        # Calls that were claimed before it opened have ended.
        await until(lambda: floor.statuses(sku)["charging"] == 0, "no calls under way")
        posts, waiting = int(str(books(floor, "/ledger")["posts"])), floor.statuses(sku)["reserved"]
        await until(lambda: floor.statuses(sku)["reserved"] >= waiting + 60, "orders that are decided")
        summary = books(floor, "/ledger")
        # One call after 1 s, 2 s, 4 s, …: five last for half a minute.
        assert int(str(summary["posts"])) - posts <= 5
        assert int(str(summary["refused"])) >= 1


@asynccontextmanager
async def frozen(floor: Floor) -> AsyncIterator[None]:
    """The provider stands still, for `FROZEN` seconds whatever else the test does: no longer than it may."""
    assert floor.provider.pid is not None
    process = psutil.Process(floor.provider.pid)
    going_on = threading.Timer(FROZEN, os.kill, (floor.provider.pid, signal.SIGCONT))
    process.send_signal(signal.SIGSTOP)
    going_on.start()
    try:
        await until(lambda: process.status() == psutil.STATUS_STOPPED, "a provider that stands still")
        yield
    finally:
        await asyncio.to_thread(going_on.join)


async def test_frozen_for_longer_than_a_call(floor: Floor, sku: str) -> None:
    async with sale(floor, sku):
        began = time.monotonic()
        async with frozen(floor):
            await until(lambda: attempts(floor, sku)["in_doubt"] >= 1, "calls in doubt")
        assert time.monotonic() - began >= FROZEN


async def test_two_charges_for_one_call(floor: Floor, shop: Shop, sku: str) -> None:
    """The last one here: what is on the provider's books stays there."""
    floor.put_item(sku, PLENTY)
    unheard, told = [
        (await shop.buy(sku, token=token)).body["id"]
        for token in ("tok_fault_reset_after_two_charges", "tok_fault_two_charges_201")
    ]
    assert (await shop.until(unheard, "needs_review"))["reason"] == "charged_twice"
    # Nobody has a reason to ask about this one: only the books tell.
    assert (await shop.final(told))["status"] == "confirmed"
    report = await audit(floor.settings)
    assert {(finding.check, finding.subject) for finding in report.findings} == {
        ("charged twice", unheard),
        ("charged twice", told),
    }
    assert floor.posts(sku) == {unheard: 1, told: 1}
