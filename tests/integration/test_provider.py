"""The sandbox provider, as a process: it charges at every POST and forgets nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from ops.sandbox import ProviderError, ProviderProcess

#: Seconds after which something that must happen has not.
BOUND = 20.0


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path, latency=0.0) as running:
        yield running


@pytest.fixture(scope="module")
def strict_provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderProcess]:
    """One for all bad charges: none of them leaves anything behind."""
    with ProviderProcess(tmp_path_factory.mktemp("strict"), latency=0.0) as running:
        yield running


def a_charge(token: str = "tok_visa", **changes: object) -> dict[str, object]:
    whole = {
        "reference": uuid4().hex,
        "amount": 500,
        "currency": "EUR",
        "customer": "c",
        "payment_token": token,
    }
    return whole | changes


async def post(provider: ProviderProcess, charge: object, **headers: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session:
        content = charge if isinstance(charge, bytes) else json.dumps(charge).encode()
        headers = {"Content-Type": "application/json"} | headers
        async with session.post(f"{provider.url}/charges", data=content, headers=headers) as response:
            return response.status, await response.json()


async def get(provider: ProviderProcess, path: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(provider.url + path) as response:
        assert response.status == 200
        return await response.json()


async def until(condition: Callable[[], Any]) -> None:
    """Wait until `condition`, a function or coroutine function, holds."""
    async with asyncio.timeout(BOUND):
        while True:
            held = condition()
            if await held if asyncio.iscoroutine(held) else held:
                return
            await asyncio.sleep(0.01)


async def test_the_contract_word_for_word(provider: ProviderProcess) -> None:
    good, declined = a_charge(), a_charge("tok_declined")
    status, reply = await post(provider, good)
    assert (status, reply) == (
        201,
        {"id": reply["id"], "reference": good["reference"], "status": "succeeded"},
    )
    assert await get(provider, f"/charges?reference={good['reference']}") == {
        "charges": [{"id": reply["id"], "status": "succeeded"}]
    }
    status, reply = await post(provider, declined)
    assert (status, reply["status"], reply["reason"]) == (402, "declined", "card_declined")
    assert await get(provider, "/charges?reference=nobody") == {"charges": []}
    assert await get(provider, "/healthz") == {"status": "ok"}


async def test_every_post_is_a_new_charge(provider: ProviderProcess) -> None:
    charge = a_charge(reference="again")
    for _ in range(3):
        assert (await post(provider, charge, **{"Idempotency-Key": "again"}))[0] == 201
    await post(provider, a_charge("tok_declined"))
    summary = await get(provider, "/ledger")
    assert {name: summary[name] for name in ("charges", "succeeded", "declined", "charged_twice")} == {
        "charges": 4,
        "succeeded": 3,
        "declined": 1,
        "charged_twice": ["again"],
    }


async def test_a_decline_and_a_success_are_not_a_double_charge(provider: ProviderProcess) -> None:
    for token in ("tok_declined", "tok_visa", "tok_declined"):
        await post(provider, a_charge(token, reference="tried-again"))
    assert (await get(provider, "/ledger"))["charged_twice"] == []


@pytest.mark.parametrize(
    ("status", "charge"),
    [
        (400, b""),
        (400, b"{"),
        (400, b"\xff"),
        (422, b"[]"),
        (422, b"null"),
        (422, a_charge(extra=1)),
        (422, {"reference": "r"}),
        (422, a_charge(reference="")),
        (422, a_charge(reference=7)),
        (422, a_charge(reference="x" * 256)),
        (422, a_charge(amount=-1)),
        (422, a_charge(amount=1.5)),
        (422, a_charge(amount="500")),
        (422, a_charge(amount=True)),
        (422, a_charge(amount=10**15)),
        (422, a_charge(currency="EURO")),
        (422, a_charge(currency="EUR\n")),
        (422, a_charge(payment_token="")),
        (422, a_charge("tok_invalid")),
        (422, a_charge("tok_fault_of_no_kind")),
        (413, b'{"reference": "' + b"x" * 100_000),
    ],
)
async def test_bad_charges_are_refused_in_json_and_leave_no_trace(
    strict_provider: ProviderProcess, status: int, charge: object
) -> None:
    answered, reply = await post(strict_provider, charge)
    assert answered == status
    assert reply["error"]
    assert strict_provider.ledger_file.read_bytes() == b""


async def test_other_content_types_and_empty_questions_are_refused(provider: ProviderProcess) -> None:
    assert (await post(provider, a_charge(), **{"Content-Type": "text/plain"}))[0] == 415
    async with aiohttp.ClientSession() as session, session.get(f"{provider.url}/charges") as response:
        assert response.status == 400


async def test_a_fault_asked_for_once_happens_at_the_first_post_only(provider: ProviderProcess) -> None:
    first, other = a_charge("tok_fault_once_500_after_charge"), a_charge("tok_fault_once_500_after_charge")
    assert [(await post(provider, charge))[0] for charge in (first, first, other)] == [500, 201, 500]


async def test_two_charges_are_made_of_one_post(provider: ProviderProcess) -> None:
    charge = a_charge("tok_fault_two_charges_201")
    status, reply = await post(provider, charge)
    found = (await get(provider, f"/charges?reference={charge['reference']}"))["charges"]
    assert (status, len(found), reply["id"]) == (201, 2, found[1]["id"])
    assert (await get(provider, "/ledger"))["charged_twice"] == [charge["reference"]]


async def test_a_charge_shown_late_is_on_the_books_at_once_and_found_later(provider: ProviderProcess) -> None:
    reference = "late"
    with pytest.raises(aiohttp.ClientError):
        await post(provider, a_charge("tok_fault_reset_and_shown_late", reference=reference))
    assert (await get(provider, "/ledger"))["succeeded"] == 1
    assert (await get(provider, f"/charges?reference={reference}"))["charges"] == []
    assert (await get(provider, f"/ledger/posts?reference={reference}")) == {"posts": 1, "asked_too_early": 1}

    async def found() -> bool:
        return bool((await get(provider, f"/charges?reference={reference}"))["charges"])

    await until(found)


async def test_an_outage_is_told_everybody_charges_nobody_and_ends(provider: ProviderProcess) -> None:
    async with aiohttp.ClientSession() as session:

        async def outage(**asked: object) -> int:
            async with session.post(f"{provider.url}/faults", json=asked) as reply:
                return reply.status

        assert await outage(status=200, seconds=1) == 422
        assert await outage(status=401, seconds=600) == 200
        assert (await post(provider, a_charge(reference="early")))[0] == 401
        async with session.get(f"{provider.url}/charges?reference=early") as reply:
            assert reply.status == 401
        summary = await get(provider, "/ledger")
        assert (summary["charges"], summary["posts"], summary["refused"]) == (0, 1, 2)
        assert await outage(status=401, seconds=0) == 200
        assert (await post(provider, a_charge(reference="early")))[0] == 201


async def test_the_ledger_holds_no_token(provider: ProviderProcess) -> None:
    for token in ("tok_visa_s3cret", "tok_declined_s3cret", "tok_invalid_s3cret"):
        await post(provider, a_charge(token))
    kept = b"".join(path.read_bytes() for path in provider.directory.iterdir())
    assert b"card_declined" in kept
    assert b"s3cret" not in kept


async def test_a_kill_loses_no_charge_that_was_told(provider: ProviderProcess) -> None:
    """A crowd pays; the provider dies in the middle of it; what it told anybody is still on its books."""
    told: dict[str, str] = {}

    async def buyer() -> None:
        while True:
            charge = a_charge()
            _, reply = await post(provider, charge)
            told[str(charge["reference"])] = reply["id"]

    url = provider.url
    crowd = [asyncio.create_task(buyer()) for _ in range(10)]
    await until(lambda: len(told) > 200)
    provider.kill()
    ends = await asyncio.gather(*crowd, return_exceptions=True)
    assert all(isinstance(end, aiohttp.ClientError) for end in ends), ends

    provider.start()
    assert provider.url == url
    lines = provider.ledger_file.read_text().splitlines()
    kept = {entry["reference"]: entry["id"] for entry in map(json.loads, lines)}
    assert told.items() <= kept.items()
    assert (await get(provider, "/ledger"))["charges"] == len(kept)
    for reference in list(told)[-5:]:
        assert (await get(provider, f"/charges?reference={reference}"))["charges"][0]["id"] == told[reference]


async def test_a_cut_last_line_is_dropped_and_the_ledger_goes_on(provider: ProviderProcess) -> None:
    await post(provider, a_charge(reference="first"))
    provider.kill()
    with provider.ledger_file.open("ab") as ledger:
        ledger.write(b'{"id": "ch_cut", "reference": "cu')
    provider.start()
    await post(provider, a_charge(reference="second"))
    entries = [json.loads(line) for line in provider.ledger_file.read_text().splitlines()]
    assert [entry["reference"] for entry in entries] == ["first", "second"]
    assert (await get(provider, "/ledger"))["charges"] == 2


async def test_a_damaged_ledger_stops_the_start_and_is_left_alone(provider: ProviderProcess) -> None:
    provider.stop()
    damaged = b"not a charge\n"
    provider.ledger_file.write_bytes(damaged)
    with pytest.raises(ProviderError, match="line 1 cannot be read"):
        provider.start()
    assert provider.ledger_file.read_bytes() == damaged
    assert provider.pid is None


def test_one_ledger_has_one_provider(provider: ProviderProcess) -> None:
    with pytest.raises(ProviderError, match="another provider is using this ledger"):
        ProviderProcess(provider.directory).start()


async def test_all_charges_can_be_read_at_once(provider: ProviderProcess) -> None:
    references = [str(a_charge()["reference"]) for _ in range(5)]
    for reference in references:
        await post(provider, a_charge(reference=reference))
    async with aiohttp.ClientSession() as session, session.get(f"{provider.url}/ledger/charges") as response:
        lines = (await response.text()).splitlines()
    assert [json.loads(line)["reference"] for line in lines] == references


async def test_a_caller_who_hangs_up_is_charged_all_the_same(tmp_path: Path) -> None:
    charge = a_charge(reference="impatient")
    with ProviderProcess(tmp_path, latency=1.0) as provider:
        calling = asyncio.create_task(post(provider, charge))

        async def taken() -> bool:
            return bool((await get(provider, "/ledger/posts?reference=impatient"))["posts"])

        async def charged() -> bool:
            return len((await get(provider, "/charges?reference=impatient"))["charges"]) == 1

        await until(taken)
        assert not await charged(), "the call was over before it could be given up"
        calling.cancel()
        await until(charged)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "ops.provider", "--ledger", str(tmp_path / "ledger")]
    process = subprocess.Popen(  # noqa: ASYNC220 - starting takes no time worth a thread
        [*command, "--port-file", str(port_file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        await until(port_file.exists)
        url = f"http://127.0.0.1:{port_file.read_text()}"
        async with aiohttp.ClientSession() as session:
            silent = a_charge("tok_fault_silent_after_charge", reference="silent")
            calling = asyncio.create_task(session.post(f"{url}/charges", json=silent))
            await until(lambda: b"silent" in (tmp_path / "ledger").read_bytes())
            process.send_signal(number)
            out, err = await asyncio.to_thread(process.communicate, timeout=BOUND)
            with pytest.raises(aiohttp.ClientError):
                await calling
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert out == f"sandbox provider listening on {url}\n"
    assert err == ""


async def test_it_ends_with_its_starter_however_that_ends(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys; from ops.sandbox import ProviderProcess\n"
        "provider = ProviderProcess(pathlib.Path(sys.argv[1])); provider.start()\n"
        "print(provider.url, flush=True); sys.stdin.read()"
    )
    starter = subprocess.Popen(  # noqa: ASYNC220 - starting takes no time worth a thread
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    assert starter.stdin is not None
    url = (await asyncio.to_thread(starter.stdout.readline)).strip()
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/healthz") as response:
            assert response.status == 200
        starter.kill()
        starter.wait()
        starter.stdin.close()
        starter.stdout.close()

        async def gone() -> bool:
            try:
                async with session.get(f"{url}/healthz", timeout=aiohttp.ClientTimeout(total=1)):
                    return False
            except (aiohttp.ClientError, TimeoutError):
                return True

        await until(gone)


@pytest.mark.parametrize("option", [["--latency", "-1"], ["--latency", "nan"], ["--port", "x"], []])
def test_options_that_cannot_work_are_refused(tmp_path: Path, option: list[str]) -> None:
    ledger = ["--ledger", str(tmp_path / "ledger")] if option else []
    ended = subprocess.run(
        [sys.executable, "-m", "ops.provider", *ledger, *option],
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert ended.returncode == 2
    assert (option[0] if option else "--ledger") in ended.stderr


def test_stopping_twice_and_starting_twice(provider: ProviderProcess) -> None:
    with pytest.raises(ProviderError, match="is running"):
        provider.start()
    first = provider.pid
    provider.stop()
    provider.stop()
    assert provider.pid is None
    provider.start()
    assert provider.pid not in (None, first)
