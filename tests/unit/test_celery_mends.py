"""Celery's parts that we mended, at the place where they broke. Whole workers meet these faults in `tests/chaos`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.concurrency.asynpool import AsynPool
from celery.worker.consumer import Consumer

from shared.calling import make_celery
from shared.settings import Settings
from workers.consuming import PromptConsumer
from workers.pooling import SturdyPool


def test_a_process_whose_end_was_noticed_is_not_watched_again() -> None:
    ended = SimpleNamespace(_sentinel_poll=None)
    hub = SimpleNamespace(add_reader=lambda *_: pytest.fail("watches what is gone"))
    SturdyPool._track_child_process(SturdyPool.__new__(SturdyPool), ended, hub)


def test_a_process_without_pipes_for_its_successor_is_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pipes(_: AsynPool) -> None:
        raise StopIteration

    monkeypatch.setattr(AsynPool, "maintain_pool", no_pipes)
    SturdyPool.maintain_pool(SturdyPool.__new__(SturdyPool))


def test_a_lost_connection_is_put_away_whatever_kombu_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def emptied(*_: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'hostname'")

    monkeypatch.setattr(Consumer, "on_connection_error_after_connected", emptied)
    PromptConsumer.on_connection_error_after_connected(PromptConsumer.__new__(PromptConsumer), OSError())


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_what_is_raised_when_a_connection_is_lost_does_not_end_a_worker(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def made(consumer: Consumer) -> None:
        consumer.connection_errors = (OSError,)  # type: ignore[attr-defined]

    monkeypatch.setattr(Consumer, "__init__", made)
    assert issubclass(error, PromptConsumer().connection_errors)


def test_the_workers_are_made_of_them() -> None:
    settings = Settings(database_url="postgresql://u@h/d", redis_url="redis://127.0.0.1:9/0")
    app = make_celery(settings)
    assert app.conf.worker_pool == "workers.pooling:SturdyTaskPool"
    assert app.conf.worker_consumer == "workers.consuming:PromptConsumer"
    assert app.conf.broker_channel_error_retry
    assert app.conf.broker_connection_max_retries is None  # a hundred is the default, then the worker ends
    app.close()
