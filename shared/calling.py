"""Calling a lane, or the charge workers: the one place outside `workers` that speaks Celery.

A Celery message is a claim check: not a purchase, but the word that a lane has some. Calls are coalesced: whoever has
work for a lane sets `called:<queue>` if it is free, and only then publishes. Whoever takes the message deletes the mark
before it reads the lane, so work committed after that read is called for again. A message that is lost, or a mark that
nobody honours, costs at most `CALLED_TTL` and one round of the sweep.

A charge worker that stays to look again sets the mark itself, and publishes nothing (`workers.charge`).

With `FAIRLANE_DELIVERY=purchase` a lane is called once per purchase, task id = purchase id, and nothing is coalesced;
the same task decides the same batches.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from celery import Celery
from kombu import Exchange, Producer, Queue
from kombu.exceptions import OperationalError
from redis import Redis, RedisError

from shared import keys
from shared.crash_points import crash_point
from shared.redis_clients import Pipeline, make_redis, script
from shared.routing import CHARGE, CHARGES_QUEUE, DECIDE, RECONCILE, Router, queue_of, queues
from shared.settings import Delivery, Settings

log = structlog.get_logger()

#: The unnamed exchange delivers by queue name alone. A named one keeps its bindings in Redis and loses them in a flush.
_DIRECT = Exchange("", type="direct")


def make_celery(settings: Settings) -> Celery:
    """The Celery app, for those who call and those who are called: JSON only, one queue per lane, one for charges."""
    app = Celery("fairlane", broker=settings.celery_broker_url)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        task_queues=[Queue(name, _DIRECT, routing_key=name) for name in queues(settings.lanes)],
        task_default_queue=CHARGES_QUEUE,
        task_default_exchange="",
        task_default_routing_key=CHARGES_QUEUE,
        task_create_missing_queues=False,
        task_routes=[Router(settings.lanes)],
        # What a task returned travels as an event, for Flower; nobody waits for a result.
        task_ignore_result=True,
        task_send_sent_event=False,
        worker_send_task_events=True,
        # Early: a claim check that is delivered again helps nobody, the sweep repeats what was lost.
        task_acks_late=False,
        # A message taken in advance would wait behind a busy task while another process is free.
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        # What the worker of the Procfile's `lanes` and every consumer are made of; see there for what is mended.
        worker_pool="workers.pooling:SturdyTaskPool",
        worker_consumer="workers.consuming:PromptConsumer",
        # A broker that is out of memory refuses commands; that ends a worker unless it counts as a lost connection.
        broker_channel_error_retry=True,
        broker_connection_retry_on_startup=True,
        # For ever: a worker that ended after a hundred tries would have to be started by hand.
        broker_connection_max_retries=None,
        # Without these, a worker cut off from Redis waits for its answer for ever.
        broker_transport_options={
            "socket_timeout": settings.redis_timeout * 5,
            "socket_connect_timeout": settings.redis_timeout,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "queue_order_strategy": "round_robin",
            # Nobody's call is more urgent. Kombu would keep four lists per queue, and ask for all of them each time.
            "priority_steps": [0],
            # Whoever calls must not wait for a broker that is away: the sweep calls again.
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.1,
        },
        timezone="UTC",
        enable_utc=True,
    )
    return app


@dataclass(frozen=True, slots=True)
class Call:
    """One call that may be made: the queue, and the arguments of the task that answers it.

    `mark` names it among the calls that are out (`called:<mark>`); usually that is its queue.
    """

    queue: str
    task: str
    kwargs: dict[str, Any]
    task_id: str | None = None
    mark: str = ""

    @property
    def called(self) -> str:
        """The key of its mark."""
        return keys.called(self.mark or self.queue)

    @property
    def speaks_for_others(self) -> bool:
        """Whether a message that still lies in the queue says the same as this one would."""
        return self.task_id is None and not self.mark


def lane_call(lane: int, purchase_id: str | None = None) -> Call:
    """The word that `lane` has work; named after one purchase when each is to be seen."""
    return Call(queue_of(lane), DECIDE, {"lane": lane}, purchase_id)


CHARGES_CALL = Call(CHARGES_QUEUE, CHARGE, {})
"""The word that purchases are due to be charged."""

RECONCILE_CALL = Call(CHARGES_QUEUE, RECONCILE, {}, mark="reconcile")
"""The word that the provider is to be asked about calls without an outcome."""


class Caller:
    """Makes calls. The marks go on any pipeline, sync or async; publishing blocks and belongs into a thread there."""

    def __init__(self, settings: Settings, celery: Celery, client: Redis | None = None) -> None:
        self._delivery = settings.delivery
        self._ttl_ms = int(settings.called_ttl * 1000)
        self._celery = celery
        self._redis = client or make_redis(settings)
        self._token = secrets.token_hex(8)

    def calls_for(self, purchases: Iterable[tuple[int, str]]) -> list[Call]:
        """The calls for these newly accepted purchases, given as (lane, purchase id)."""
        if self._delivery is Delivery.PURCHASE:
            return [lane_call(lane, purchase_id) for lane, purchase_id in purchases]
        return [lane_call(lane) for lane in sorted({lane for lane, _ in purchases})]

    def queue_marks(self, pipe: Pipeline, calls: Sequence[Call]) -> None:
        """Queue one SET per call; its reply says whether the mark was free, so that the call is to be published."""
        for call in calls:
            if call.task_id is None:
                pipe.set(call.called, self._token, nx=True, px=self._ttl_ms)

    def to_publish(self, calls: Sequence[Call], replies: Sequence[Any]) -> list[Call]:
        """The calls to publish, given the replies to `queue_marks`: not those that somebody made already."""
        answers = iter(replies)
        return [call for call in calls if call.task_id is not None or next(answers)]

    def publish(self, calls: Sequence[Call]) -> None:
        """Publish these calls. A failure is logged and the mark taken back, so that the sweep may call at once.

        A claim check that still lies in the queue speaks for this call too: whoever takes it will read later than now.
        So a fleet that is away for hours comes back to one message per lane, not to thousands.
        """
        if not calls:
            return
        unpublished = list(calls)
        try:
            with self._celery.producer_or_acquire() as producer:
                while unpublished:
                    call = unpublished[0]
                    crash_point("call.before_publish")
                    if not call.speaks_for_others or _is_empty(producer, call.queue):
                        self._celery.send_task(
                            call.task, kwargs=call.kwargs, task_id=call.task_id, producer=producer, retry=False
                        )
                    crash_point("call.after_publish")
                    unpublished.pop(0)
        except (OperationalError, RedisError, OSError) as error:
            log.warning("call_not_published", queues=[call.queue for call in unpublished], error=str(error))
            self._take_back(unpublished)

    def call(self, calls: Sequence[Call], *, unheard: Sequence[Call] = ()) -> None:
        """Mark and publish in one go, blocking. Failures are only logged: the sweep repeats what was lost.

        `unheard` are calls of which nothing came, though a mark may say that they were made: those are made again.
        """
        calls = [*calls, *unheard]
        if not calls:
            return
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                if unheard:
                    pipe.delete(*(call.called for call in unheard))
                self.queue_marks(pipe, calls)
                replies = pipe.execute()[1 if unheard else 0 :]
        except RedisError as error:
            log.warning("call_not_made", queues=[call.queue for call in calls], error=str(error))
            return
        self.publish(self.to_publish(calls, replies))

    def _take_back(self, calls: Sequence[Call]) -> None:
        marks = [call.called for call in calls if call.task_id is None]
        if not marks:
            return
        try:
            self._redis.eval(script("delete_if_equal"), len(marks), *marks, *[self._token] * len(marks))
        except RedisError:
            log.warning("call_not_taken_back", queues=[call.queue for call in calls])


def _is_empty(producer: Producer, queue: str) -> bool:
    """Whether no message waits in the queue. Declaring it again changes nothing and tells its length."""
    channel: Any = producer.channel
    return bool(channel.queue_declare(queue=queue).message_count == 0)
