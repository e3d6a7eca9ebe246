"""Buying over HTTP where the door would refuse: a key that is known gets its purchase all the same."""

from __future__ import annotations

import asyncio

import psycopg
from redis import Redis

from shared import keys
from tests.integration.conftest import RunApi
from tests.integration.http_calls import ADMIN, SHOP, Answer, assert_problem, call
from tests.processes.process import wait_for

ORDER = {"item": "tee", "quantity": 1, "customer": "c-1", "payment_token": "tok_visa"}


async def buy(api: str, key: str, item: str = "tee") -> Answer:
    return await call("POST", f"{api}/v1/purchases", SHOP | {"Idempotency-Key": key}, ORDER | {"item": item})


async def test_a_full_queue_refuses_new_keys_and_answers_known_ones(
    run_api: RunApi, environment: dict[str, str]
) -> None:
    patient = {
        "FAIRLANE_LOCK_TIMEOUT": "60",
        "FAIRLANE_STATEMENT_TIMEOUT": "60",
        "FAIRLANE_CONNECTION_TIMEOUT": "90",
        "FAIRLANE_ACCEPT_QUEUE": "1",
    }
    with run_api(environment | patient) as api:
        terms = {"name": "Tee", "stock": 9, "price": 100, "currency": "EUR"}
        assert (await call("PUT", f"{api}/v1/items/tee", ADMIN, terms)).status == 201
        bought = await buy(api, "known")
        with psycopg.connect(environment["FAIRLANE_DATABASE_URL"]) as connection:
            # Rows can be read but not inserted: the commit under way stands still, and the next one collects.
            connection.execute("LOCK TABLE fairlane.purchases IN SHARE MODE")
            committing = asyncio.create_task(buy(api, "committing"))
            waiting_for_a_lock = "SELECT count(*) FROM pg_locks WHERE NOT granted"

            def stands_still() -> bool:
                row = connection.execute(waiting_for_a_lock).fetchone()
                return row is not None and row[0] > 0

            assert await asyncio.to_thread(wait_for, stands_still, 20)
            others = [asyncio.create_task(buy(api, f"new-{number}")) for number in range(2)]
            (refused,), _ = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
            assert_problem(refused.result(), 503, "queue-full")
            assert refused.result().headers["Retry-After"] == "1"

            again = await buy(api, "known")
            assert (again.status, again.headers["Idempotent-Replayed"]) == (202, "true")
            assert again.json["id"] == bought.json["id"]
        answers = await asyncio.gather(committing, *others)
        assert sorted(answer.status for answer in answers) == [202, 202, 503]


async def test_a_known_key_is_answered_where_a_new_one_is_refused(api: str, api_environment: dict[str, str]) -> None:
    terms = {"name": "Tee", "stock": 1, "price": 100, "currency": "EUR"}
    assert (await call("PUT", f"{api}/v1/items/last-tee", ADMIN, terms)).status == 201
    bought = await buy(api, "the-last", "last-tee")
    assert bought.status == 202
    assert (await call("PUT", f"{api}/v1/items/last-tee", ADMIN, terms | {"stock": 0})).status == 200
    with Redis.from_url(api_environment["FAIRLANE_REDIS_URL"]) as redis:
        assert redis.delete(keys.seen("shop", "the-last")) == 1  # the door has forgotten it; Postgres has not

    assert_problem(await buy(api, "too-late", "last-tee"), 409, "sold-out")
    again = await buy(api, "the-last", "last-tee")
    assert (again.status, again.json.get("id")) == (202, bought.json["id"])
    assert again.headers["Idempotent-Replayed"] == "true"


async def test_times_are_shown_in_utc_with_six_fraction_digits(api: str) -> None:
    terms = {"name": "Tee", "stock": 9, "price": 100, "currency": "EUR", "opens_at": "2026-01-01T00:00:00+01:00"}
    answer = await call("PUT", f"{api}/v1/items/times", ADMIN, terms)
    assert answer.json["opens_at"] == "2025-12-31T23:00:00.000000Z"
    shown = await call("GET", f"{api}/v1/items/times", SHOP)
    assert shown.json["opens_at"] == "2025-12-31T23:00:00.000000Z"
