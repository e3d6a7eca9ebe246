"""Accepting on a real Postgres: one key one purchase, in order of arrival, and a clear word when it cannot be known."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec.structs
import psycopg
import pytest
import structlog.testing
from sqlalchemy.exc import DBAPIError

from producers.accept import Acceptance, Accepted, Acceptor, KeyReused, Order, UnknownItem
from shared import keys
from shared.errors import QueueFullError, UnavailableError
from shared.purchases import PurchaseRecord
from shared.states import Status
from tests.integration.shopfloor import BOUND, Shop, accepted, until

INSERT_UNCOMMITTED = """
WITH purchase AS (
    INSERT INTO fairlane.purchases
        (id, seq, client_id, idempotency_key, item, lane, quantity, customer, payment_token, amount, currency)
    VALUES (gen_random_uuid(), 0, 'shop', %s, 'sku-1', 0, 1, 'c', 't', 1, 'EUR')
    RETURNING client_id, idempotency_key, id
)
INSERT INTO fairlane.purchase_keys (client_id, idempotency_key, purchase_id, fingerprint)
SELECT client_id, idempotency_key, id, '' FROM purchase
"""


@contextmanager
def key_being_inserted(shop: Shop, key: str) -> Iterator[psycopg.Connection]:
    """Somebody else has inserted this key and not committed: whoever else inserts it waits for them."""
    with shop.holding(INSERT_UNCOMMITTED, key) as connection:
        yield connection


def sessions_waiting(shop: Shop) -> int:
    return len(
        shop.sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            " AND state = 'active'"
        )
    )


async def accept_all(acceptor: Acceptor, orders: list[Order]) -> list[Acceptance | BaseException]:
    return await asyncio.gather(*(acceptor.accept(order) for order in orders), return_exceptions=True)


async def test_an_accepted_order_is_committed_as_it_was_asked_for(shop: Shop) -> None:
    await shop.item(price=250, currency="CHF")
    order = shop.order(quantity=3, customer="c-42", payment_token="tok_visa", key="k-1")
    answer = accepted(await shop.acceptor().accept(order))

    (row,) = shop.purchases()
    assert not answer.replayed
    assert answer.record == PurchaseRecord(
        id=order.id,
        client="shop",
        seq=row["seq"],
        lane=row["lane"],
        rev=1,
        status=Status.QUEUED,
        item="sku-1",
        quantity=3,
        customer="c-42",
        amount=750,
        currency="CHF",
        accepted_at=answer.record.accepted_at,
    )
    assert (row["id"].hex, row["idempotency_key"], row["payment_token"]) == (order.id, "k-1", "tok_visa")


async def test_fifty_callers_with_one_key_over_five_processes_get_one_purchase(shop: Shop) -> None:
    await shop.item()
    acceptors = [shop.acceptor(engine=shop.another_engine()) for _ in range(5)]
    orders = [shop.order(key="one", customer="c") for _ in range(50)]
    answers = await asyncio.gather(*(acceptors[n % 5].accept(order) for n, order in enumerate(orders)))

    (row,) = shop.purchases()
    assert {accepted(answer).record.id for answer in answers} == {row["id"].hex}
    assert [accepted(answer).replayed for answer in answers].count(False) == 1


async def test_two_clients_may_use_the_same_key(shop: Shop) -> None:
    await shop.item()
    first, second = await shop.buy(shop.order(key="one", client="a"), shop.order(key="one", client="b"))

    assert first.id != second.id
    assert len(shop.purchases()) == 2


@pytest.mark.parametrize(
    "change", [{"quantity": 2}, {"customer": "other"}, {"payment_token": "other"}, {"item": "sku-2"}]
)
async def test_a_key_with_another_body_is_told_so(shop: Shop, change: dict[str, Any]) -> None:
    await shop.item()
    await shop.item("sku-2")
    first = shop.order(key="one", customer="c")
    await shop.buy(first)
    other = retry_of(first, **change)
    acceptor = shop.acceptor()

    assert await acceptor.accept(other) == KeyReused()
    assert await acceptor.known(other) == KeyReused()
    assert len(shop.purchases()) == 1


def retry_of(order: Order, **changes: Any) -> Order:
    """The same request once more, as the door makes an order of it: with an id of its own."""
    return msgspec.structs.replace(order, id=secrets.token_hex(16), **changes)


async def test_a_key_with_another_body_in_the_same_batch_is_told_so(shop: Shop) -> None:
    await shop.item()
    answers = await accept_all(shop.acceptor(), [shop.order(key="one", quantity=n) for n in (1, 2)])

    assert sorted(type(answer).__name__ for answer in answers) == ["Accepted", "KeyReused"]
    assert len(shop.purchases()) == 1


async def test_a_known_key_is_found_without_an_order(shop: Shop) -> None:
    await shop.item()
    order = shop.order()
    acceptor = shop.acceptor()
    assert await acceptor.known(order) is None
    (bought,) = await shop.buy(order)

    again = retry_of(order)
    assert await acceptor.known(again) == Accepted(bought, replayed=True)


async def test_twin_batches_in_opposite_orders_do_not_deadlock(shop: Shop) -> None:
    # Both wait for the key in the middle. Unsorted, each would by then have inserted what the other needs next.
    await shop.item()
    wanted = [f"k-{n:02d}" for n in range(21)]
    forwards = [shop.order(key=key, customer="c") for key in wanted]
    backwards = [shop.order(key=key, customer="c") for key in reversed(wanted)]
    acceptors = [shop.acceptor(engine=shop.another_engine()) for _ in range(2)]
    with key_being_inserted(shop, wanted[10]) as somebody:
        twins = [
            asyncio.create_task(accept_all(acceptor, orders))
            for acceptor, orders in zip(acceptors, (forwards, backwards), strict=True)
        ]
        await until(lambda: sessions_waiting(shop) == 2)
        somebody.rollback()
        answers = [answer for twin in twins for answer in await twin]

    assert all(isinstance(answer, Accepted) for answer in answers), answers
    assert sorted(row["idempotency_key"] for row in shop.purchases()) == wanted


async def test_a_key_that_somebody_committed_while_the_insert_waited_is_found(shop: Shop) -> None:
    await shop.item()
    with key_being_inserted(shop, "one") as somebody:
        accepting = asyncio.create_task(shop.acceptor().accept(shop.order(key="one")))
        await shop.someone_waits_for_a_lock()
        somebody.commit()
        assert await accepting == KeyReused()  # they had asked for something else


async def test_places_in_the_line_are_given_in_order_of_arrival_not_of_the_keys(shop: Shop) -> None:
    await shop.item(stock=1_000)
    orders = [shop.order(key=f"k-{9_999 - n}") for n in range(150)]
    records = await shop.buy(*orders)

    assert [record.id for record in records] == [order.id for order in orders]
    seqs = [record.seq for record in records]
    assert seqs == sorted(seqs)
    assert len({row["accepted_at"] for row in shop.purchases()}) == 1  # one batch, or this would prove nothing


async def test_the_price_is_the_items_when_it_is_accepted(shop: Shop) -> None:
    await shop.item(price=500)
    (before,) = await shop.buy(shop.order(quantity=2))
    await shop.item(price=700)
    (after,) = await shop.buy(shop.order(quantity=2))

    assert (before.amount, after.amount) == (1_000, 1_400)
    assert shop.purchase(before)["amount"] == 1_000


async def test_the_dearest_price_and_the_largest_quantity_fit(shop: Shop) -> None:
    await shop.item(price=10**15, stock=1_000)
    (bought,) = await shop.buy(shop.order(quantity=1_000))

    assert bought.amount == 10**18


async def test_an_unknown_item_gives_no_purchase_and_disturbs_no_other(shop: Shop) -> None:
    await shop.item()
    acceptor = shop.acceptor()
    orders = [shop.order(), shop.order("nothing-of-this-name"), shop.order()]
    answers = await accept_all(acceptor, orders)

    assert [type(answer) for answer in answers] == [Accepted, UnknownItem, Accepted]
    assert len(shop.purchases()) == 2


@pytest.mark.parametrize("field", ["client", "customer", "payment_token", "key"])
async def test_a_value_that_postgres_refuses_fails_alone(shop: Shop, field: str) -> None:
    await shop.item(stock=1_000)
    orders = [shop.order() for _ in range(20)]
    wrong: dict[str, Any] = {field: "a\x00b"}
    orders[13] = msgspec.structs.replace(orders[13], **wrong)
    answers = await accept_all(shop.acceptor(), orders)

    assert isinstance(answers[13], DBAPIError)
    assert [type(answer) for answer in answers if answer is not answers[13]] == [Accepted] * 19
    assert {row["id"].hex for row in shop.purchases()} == {order.id for order in orders} - {orders[13].id}


async def test_without_postgres_nothing_is_accepted(shop: Shop) -> None:
    nowhere = shop.another_engine(shop.with_settings(database_url="postgresql://nobody@127.0.0.1:9/nothing"))
    acceptor = shop.acceptor(engine=nowhere)

    with pytest.raises(UnavailableError):
        await acceptor.accept(shop.order())
    with pytest.raises(UnavailableError):
        await acceptor.known(shop.order())


COMMITS_WAIT_FOR_LOCK_1 = """
CREATE FUNCTION wait_for_lock_1() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON fairlane.purchases
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_for_lock_1();
"""


async def test_a_connection_cut_during_the_commit_is_unavailable_and_a_retry_finds_out(shop: Shop) -> None:
    await shop.item()
    shop.sql(COMMITS_WAIT_FOR_LOCK_1)
    acceptor = shop.acceptor()
    order = shop.order()
    with shop.holding("SELECT pg_advisory_xact_lock(1)"):
        accepting = asyncio.create_task(acceptor.accept(order))
        await shop.someone_waits_for_a_lock()
        (cut,) = shop.sql(
            "SELECT query, pg_terminate_backend(pid) AS ended FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        assert (cut["query"], cut["ended"]) == ("COMMIT", True)
        with pytest.raises(UnavailableError):
            await accepting

    assert shop.purchases() == []
    again = accepted(await acceptor.accept(retry_of(order)))  # on the same engine: it mends itself
    assert not again.replayed
    assert [row["id"].hex for row in shop.purchases()] == [again.record.id]


async def test_a_retry_after_a_commit_that_nobody_heard_of_gets_that_purchase(shop: Shop) -> None:
    await shop.item()
    order = shop.order()
    (made,) = await shop.buy(order)
    shop.forget_calls()

    answer = await shop.acceptor().accept(retry_of(order))
    assert answer == Accepted(made, replayed=True)


async def test_more_than_the_queue_holds_is_refused_with_nothing_recorded(shop: Shop) -> None:
    await shop.item()
    acceptor = shop.acceptor(shop.with_settings(accept_batch=1, accept_queue=3))
    with key_being_inserted(shop, "blocked"):
        committing = asyncio.create_task(acceptor.accept(shop.order(key="blocked")))
        await shop.someone_waits_for_a_lock()
        waiting = [asyncio.create_task(acceptor.accept(shop.order(key=f"waits-{n}"))) for n in range(3)]
        await asyncio.sleep(0)
        async with asyncio.timeout(BOUND):
            with pytest.raises(QueueFullError):
                await acceptor.accept(shop.order(key="refused"))
    await asyncio.gather(committing, *waiting)

    assert [row["idempotency_key"] for row in shop.purchases()] == ["blocked", "waits-0", "waits-1", "waits-2"]


async def test_a_caller_who_hangs_up_does_not_cancel_the_commit(shop: Shop) -> None:
    await shop.item()
    acceptor = shop.acceptor()
    with key_being_inserted(shop, "blocked"):
        both = [asyncio.create_task(acceptor.accept(shop.order(key=key))) for key in ("blocked", "beside")]
        await shop.someone_waits_for_a_lock()
        both[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await both[0]
    assert isinstance(await both[1], Accepted)

    assert len(shop.purchases()) == 2


async def test_after_the_commit_the_status_and_the_call_are_in_redis(shop: Shop) -> None:
    saved = await shop.item()
    order = shop.order(client="shop", key="k-1")
    (bought,) = await shop.buy(order)

    queue = f"lane.{saved.lane:02d}"
    assert str(shop.plain_redis.get(keys.purchase(bought.id))).startswith("1|")
    assert shop.called(queue)
    assert len(shop.messages(queue)) == 1


async def test_a_batch_calls_each_of_its_lanes_once(shop: Shop) -> None:
    lanes = {(await shop.item(f"sku-{n}")).lane for n in range(20)}
    await shop.buy(*(shop.order(f"sku-{n % 20}") for n in range(60)))

    called = {lane for lane in range(shop.settings.lanes) if shop.messages(f"lane.{lane:02d}")}
    assert called == lanes
    assert all(len(shop.messages(f"lane.{lane:02d}")) == 1 for lane in lanes)


async def test_a_replay_writes_no_status_of_the_past_and_calls_nobody(shop: Shop) -> None:
    saved = await shop.item()
    order = shop.order()
    await shop.buy(order)
    shop.forget_calls()
    acceptor = shop.acceptor()
    await acceptor.accept(retry_of(order))
    await acceptor.close()

    assert shop.plain_redis.keys("*") == []
    assert not shop.called(f"lane.{saved.lane:02d}")


async def test_while_redis_hangs_no_more_is_kept_to_be_told_than_may_wait_for_a_commit(shop: Shop) -> None:
    await shop.item()
    settings = shop.with_settings(accept_queue=3, redis_timeout=1.5)
    acceptor = Acceptor(shop.engine, shop.redis, shop.caller, settings)
    shop.plain_redis.client_pause(1300)
    with structlog.testing.capture_logs() as logs:
        for _ in range(6):
            assert isinstance(await acceptor.accept(shop.order()), Accepted)
        await acceptor.close()

    left_out = [entry["purchases"] for entry in logs if entry["event"] == "accepted_not_published"]
    assert left_out  # and Postgres has them all: the sweep calls, readers ask there
    assert len(shop.purchases()) == 6
    told = sum(1 for _ in shop.plain_redis.scan_iter("fairlane:purchase:*"))
    assert told == 6 - sum(left_out)


async def test_redis_that_is_gone_after_the_commit_changes_nothing_of_the_answer(shop: Shop) -> None:
    await shop.item()
    acceptor = Acceptor(shop.engine, shop.redis_that_is_down(), shop.caller, shop.settings)
    answer = await acceptor.accept(shop.order())
    await acceptor.close()

    assert isinstance(answer, Accepted)
    assert len(shop.purchases()) == 1
    assert shop.plain_redis.keys("*") == []
