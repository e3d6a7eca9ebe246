"""`fairlane buy` at a running service: what it prints, and the exit code a script goes by."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

from ops.embedded.ports import free_port
from tests.acceptance.service import Service
from tests.acceptance.shop import Shop
from tests.processes.process import child_environment

FAIRLANE = str(Path(sys.executable).with_name("fairlane"))
#: A command that starts Python and waits for one purchase; a loaded machine may need twenty times as long.
COMMAND_WITHIN = 60


async def buy(service: Service, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as it is installed, as the client called shop, with a card that is good unless another is given."""
    env = {"FAIRLANE_URL": service.url, "FAIRLANE_API_KEY": "shop-secret", "FAIRLANE_PAYMENT_TOKEN": "tok_visa"}
    done = await asyncio.to_thread(
        lambda: subprocess.run(
            [FAIRLANE, "buy", *arguments, "--customer", "c-1"],
            env=child_environment(env | environment),
            capture_output=True,
            text=True,
            timeout=COMMAND_WITHIN,
            check=False,
        )
    )
    assert "tok_" not in done.stdout + done.stderr
    return done


async def test_confirmed_is_0_and_the_purchase_is_printed(service: Service, shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=2)
    first = await buy(service, sku, "--quantity", "2", "--key", f"{sku}-a")
    assert (first.returncode, first.stderr) == (0, "")
    purchase = json.loads(first.stdout)
    assert (purchase["status"], purchase["item"], purchase["quantity"]) == ("confirmed", sku, 2)
    assert purchase == await shop.show(purchase["id"])
    again = await buy(service, sku, "--quantity", "2", "--key", f"{sku}-a")
    assert json.loads(again.stdout)["id"] == purchase["id"]
    assert [row["status"] for row in service.purchases(sku)] == ["confirmed"]


async def test_any_other_end_is_1(service: Service, shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=1)
    declined = await buy(service, sku, FAIRLANE_PAYMENT_TOKEN="tok_declined")
    assert declined.returncode == 1
    assert json.loads(declined.stdout)["status"] == "declined"


async def test_a_refusal_is_1_and_says_why(service: Service, shop: Shop, sku: str) -> None:
    await shop.put_item(sku, stock=1)
    too_many = await buy(service, sku, "--quantity", "2")
    assert (too_many.returncode, too_many.stdout) == (1, "")
    assert re.fullmatch(r"fairlane: sold-out: .+\n", too_many.stderr)
    stranger = await buy(service, sku, FAIRLANE_API_KEY="nobody")
    assert (stranger.returncode, stranger.stdout) == (1, "")
    assert re.fullmatch(r"fairlane: unauthorized: .+\n", stranger.stderr)


async def test_no_definite_answer_is_2_and_names_the_key_to_ask_with(service: Service, shop: Shop, sku: str) -> None:
    nowhere = await buy(service, sku, "--within", "0.5", FAIRLANE_URL=f"http://127.0.0.1:{free_port()}")
    assert (nowhere.returncode, nowhere.stdout) == (2, "")
    assert re.fullmatch(r"fairlane: .+ --key [0-9a-f]{32}\n", nowhere.stderr)
    await shop.put_item(sku, stock=1)
    with service.provider_silent():
        waiting = await buy(service, sku, "--within", "2")
    assert waiting.returncode == 2
    purchase = json.loads(waiting.stdout)
    (named,) = re.findall(r"--key ([0-9a-f]{32})\n", waiting.stderr)
    later = await buy(service, sku, "--key", named)
    assert later.returncode == 0
    assert json.loads(later.stdout)["id"] == purchase["id"]


async def test_a_mistake_is_2(service: Service, sku: str) -> None:
    for arguments, environment, words in [
        ((sku,), {"FAIRLANE_API_KEY": ""}, "FAIRLANE_API_KEY"),
        ((sku, "--quantity", "0"), {}, "quantity"),
        ((), {}, "item"),
    ]:
        done = await buy(service, *arguments, **environment)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert words in done.stderr
