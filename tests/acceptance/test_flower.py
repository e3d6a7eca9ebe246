"""Flower beside a running sale: it shows the workers and their tasks, and nothing of a purchase."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import socket
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.acceptance.service import FLOWER_AUTH, Service, eventually, status_of
from tests.acceptance.shop import Shop

#: Events reach Flower within a second; its list of workers is asked for when it starts, which may be a bit later.
SHOWN_WITHIN = 20.0


def flower(service: Service, path: str) -> Any:
    """What Flower's API answers to somebody with the password."""
    login = base64.b64encode(FLOWER_AUTH.encode()).decode()
    request = urllib.request.Request(f"{service.flower_url}{path}", headers={"Authorization": f"Basic {login}"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=15) as reply:  # noqa: S310  # a URL of this test
        return json.loads(reply.read())


def open_metrics(service: Service) -> str:
    """What Flower tells everybody: its metrics ask for no password."""
    with urllib.request.urlopen(f"{service.flower_url}/metrics", timeout=15) as reply:  # noqa: S310  # a URL of this test
        return str(reply.read().decode())


async def test_a_sale_seen_in_flower(service: Service, shop: Shop, sku: str) -> None:
    node = socket.gethostname()
    online = {f"lanes@{node}": True, f"charges@{node}": True}
    eventually(lambda: flower(service, "/api/workers?status=1") == online, SHOWN_WITHIN, "both workers are online")
    workers = flower(service, "/api/workers?refresh=1")
    assert workers.keys() == online.keys()
    assert [queue["name"] for queue in workers[f"charges@{node}"]["active_queues"]] == ["charges"]
    lanes = sorted(queue["name"] for queue in workers[f"lanes@{node}"]["active_queues"])
    assert lanes == [f"lane.{lane:02d}" for lane in range(16)]

    began = time.time()
    await shop.put_item(sku, stock=10)
    token = f"tok_visa_{sku}"
    replies = await asyncio.gather(
        *(shop.buy(sku, key=f"{sku}-key-{n}", customer=f"{sku}-customer-{n}", token=token) for n in range(20))
    )
    ids = [reply.body["id"] for reply in replies if reply.status == 202]
    ended = [await shop.final(purchase_id) for purchase_id in ids]
    assert sum(purchase["status"] == "confirmed" for purchase in ended) == 10

    def results(task: str, worker: str) -> list[dict[str, Any]]:
        """What the tasks of this sale returned, as Flower shows it."""
        shown = flower(service, f"/api/tasks?taskname={task}&limit=10000").values()
        done = [one for one in shown if one["state"] == "SUCCESS" and one["received"] >= began]
        assert all(one["worker"] == f"{worker}@{node}" for one in done)
        return [ast.literal_eval(one["result"]) for one in done]

    def added(task: str, worker: str, field: str) -> int:
        return sum(int(result[field]) for result in results(task, worker))

    eventually(lambda: added("purchases.decide", "lanes", "reserved") == 10, SHOWN_WITHIN, "lanes with their results")
    eventually(
        lambda: added("purchases.charge", "charges", "confirmed") == 10, SHOWN_WITHIN, "charges with their results"
    )
    assert results("purchases.decide", "lanes")[0].keys() == {"decided", "reserved", "left", "seconds"}
    assert results("purchases.charge", "charges")[0].keys() == {
        "claimed",
        "confirmed",
        "declined",
        "not_sent",
        "in_doubt",
        "seconds",
    }

    everything = json.dumps(flower(service, "/api/tasks?limit=10000")) + json.dumps(workers)
    everything += open_metrics(service)
    for secret in (sku, token, *ids, *(purchase["charge_id"] for purchase in ended if purchase["charge_id"])):
        assert secret not in everything


@pytest.mark.parametrize("path", ["/", "/workers", "/tasks", "/broker", "/api/workers", "/api/tasks"])
def test_flower_asks_for_its_password(service: Service, path: str) -> None:
    assert status_of(f"{service.flower_url}{path}") == 401


def test_flower_is_read_only(service: Service) -> None:
    login = base64.b64encode(FLOWER_AUTH.encode()).decode()
    request = urllib.request.Request(  # noqa: S310
        f"{service.flower_url}/api/worker/shutdown/lanes@{socket.gethostname()}",
        method="POST",
        headers={"Authorization": f"Basic {login}"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=15)  # noqa: S310
    with refused.value:
        assert refused.value.code in (403, 405)
    assert service.processes["lanes"].alive
