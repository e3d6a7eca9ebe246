"""Calling: the claim checks as they lie in Redis, for Celery to deliver."""

from __future__ import annotations

import asyncio
import json

import pytest

from shared import keys
from shared.calling import CHARGES_CALL, Call, Caller, lane_call
from shared.redis_clients import make_redis
from shared.routing import CHARGE, DECIDE
from shared.settings import Delivery
from tests.integration.shopfloor import NOBODY_LISTENS, Shop

LANE_7 = lane_call(7)


def test_two_calls_of_a_lane_are_one_message(shop: Shop) -> None:
    shop.caller.call([LANE_7])
    Caller(shop.settings, shop.celery, shop.plain_redis).call([LANE_7, lane_call(8)])

    assert [len(shop.messages(queue)) for queue in ("lane.07", "lane.08")] == [1, 1]


def test_a_lane_is_called_again_once_its_mark_and_its_message_are_gone(shop: Shop) -> None:
    shop.caller.call([LANE_7])
    shop.plain_redis.delete(keys.called("lane.07"), "lane.07")
    shop.caller.call([LANE_7])

    assert len(shop.messages("lane.07")) == 1
    assert shop.called("lane.07")


def test_a_lane_whose_message_was_taken_is_not_called_again_while_its_mark_stands(shop: Shop) -> None:
    # Whoever took it has not read the lane yet: the mark goes before the read.
    shop.caller.call([LANE_7])
    shop.plain_redis.delete("lane.07")
    shop.caller.call([LANE_7])

    assert shop.messages("lane.07") == []


def test_a_message_that_still_lies_in_the_queue_is_not_joined_by_another(shop: Shop) -> None:
    # A fleet that was away comes back to one message per lane, however often the sweep called meanwhile.
    shop.caller.call([LANE_7])
    shop.plain_redis.delete(keys.called("lane.07"))
    shop.caller.call([LANE_7])

    assert len(shop.messages("lane.07")) == 1


def test_a_mark_lives_no_longer_than_its_setting(shop: Shop) -> None:
    shop.caller.call([LANE_7])

    assert 0 < shop.plain_redis.pttl(keys.called("lane.07")) <= shop.settings.called_ttl * 1000


def test_a_lane_call_names_the_task_and_the_lane_and_nothing_else(shop: Shop) -> None:
    shop.caller.call([LANE_7])

    (message,) = shop.messages("lane.07")
    assert message["headers"]["task"] == DECIDE
    args, kwargs, _ = message["decoded"]
    assert (args, kwargs) == ([], {"lane": 7})


def test_the_call_to_the_charges_lies_in_the_charges_queue(shop: Shop) -> None:
    shop.caller.call([CHARGES_CALL])
    shop.caller.call([CHARGES_CALL])

    (message,) = shop.messages("charges")
    assert message["headers"]["task"] == CHARGE
    assert message["decoded"][:2] == [[], {}]


def test_a_flushed_broker_still_delivers_to_the_same_queue(shop: Shop) -> None:
    # A named exchange would have kept its bindings in Redis, and lost them.
    shop.caller.call([LANE_7])
    shop.plain_redis.flushall()
    shop.caller.call([LANE_7])

    assert shop.plain_redis.llen("lane.07") == 1


async def test_calls_that_could_not_be_published_take_back_their_own_marks_and_no_others(shop: Shop) -> None:
    settings = shop.with_settings(broker_url=NOBODY_LISTENS, called_ttl=600)
    caller = Caller(settings, shop.another_celery(settings), shop.plain_redis)
    calls = [LANE_7, lane_call(8), CHARGES_CALL]
    with shop.plain_redis.pipeline() as pipe:
        caller.queue_marks(pipe, calls)
        pipe.execute()
    shop.plain_redis.set(keys.called("lane.08"), "somebody else's", px=600_000)
    async with asyncio.timeout(30):
        await asyncio.to_thread(caller.publish, calls)

    assert [shop.called(queue) for queue in ("lane.07", "lane.08", "charges")] == [False, True, False]
    shop.caller.call([LANE_7])
    assert len(shop.messages("lane.07")) == 1


async def test_without_redis_a_call_is_only_logged(shop: Shop) -> None:
    with make_redis(shop.with_settings(redis_url=NOBODY_LISTENS)) as nowhere:
        Caller(shop.settings, shop.celery, nowhere).call([LANE_7])

    assert shop.messages("lane.07") == []


def test_by_lane_the_purchases_of_a_lane_make_one_call(shop: Shop) -> None:
    assert shop.caller.calls_for([(3, "a"), (1, "b"), (3, "c")]) == [lane_call(1), lane_call(3)]


def test_by_purchase_every_purchase_has_a_message_named_after_it(shop: Shop) -> None:
    settings = shop.with_settings(delivery=Delivery.PURCHASE)
    caller = Caller(settings, shop.celery, shop.plain_redis)
    caller.call(caller.calls_for([(7, "a" * 32), (7, "b" * 32)]))

    messages = shop.messages("lane.07")
    assert [message["headers"]["id"] for message in messages] == ["a" * 32, "b" * 32]
    assert [message["decoded"][1] for message in messages] == [{"lane": 7}, {"lane": 7}]
    assert not shop.called("lane.07")


def test_coalesced_and_named_calls_can_be_mixed(shop: Shop) -> None:
    named = Call("lane.07", DECIDE, {"lane": 7}, "a" * 32)
    shop.caller.call([LANE_7])
    shop.caller.call([lane_call(8), named, LANE_7])

    assert [len(shop.messages(queue)) for queue in ("lane.07", "lane.08")] == [2, 1]


@pytest.mark.parametrize("delivery", list(Delivery))
async def test_no_message_holds_anything_of_a_purchase(shop: Shop, delivery: Delivery) -> None:
    settings = shop.with_settings(delivery=delivery)
    celery = shop.another_celery(settings)
    saved = await shop.item("sku-sold-here")
    acceptor = shop.acceptor(settings)
    acceptor._caller = Caller(settings, celery, shop.plain_redis)
    order = shop.order(
        "sku-sold-here", customer="customer-4711", payment_token="tok_4711", key="key-4711", client="client-4711"
    )
    await acceptor.accept(order)
    await acceptor.close()

    (message,) = shop.messages(f"lane.{saved.lane:02d}")
    text = json.dumps(message)
    assert '"lane"' in text  # the decoded body is part of what is searched
    for secret in ("sku-sold-here", "4711", order.fingerprint().hex()):
        assert secret not in text
