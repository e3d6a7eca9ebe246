"""Clients for Redis, sync and async, and the Lua scripts in `shared/lua`.

Scripts are sent whole (EVAL), never by hash: one call carries a whole batch, so its text costs next to nothing, and
a server that was restarted needs no reloading in the middle of a pipeline.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias

import hiredis
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.settings import Settings

#: What our modules queue commands on: nothing is sent before its owner executes it.
Pipeline: TypeAlias = redis.client.Pipeline | redis.asyncio.client.Pipeline


@cache
def script(name: str) -> str:
    """The text of `shared/lua/<name>.lua`, whose head says what KEYS, ARGV and the reply are."""
    return files("shared").joinpath("lua", f"{name}.lua").read_text()


def make_redis(settings: Settings) -> redis.Redis:
    """A client for the processes that decide.

    Nothing is retried by the client itself: a reply can be lost after the command ran, and whoever asked knows
    better whether to ask again.
    """
    return redis.Redis.from_url(
        settings.redis_url,
        decode_responses=True,
        socket_timeout=settings.redis_timeout,
        socket_connect_timeout=settings.redis_timeout,
        retry=Retry(NoBackoff(), 0),
    )


class _Improved(redis.asyncio.connection.AbstractConnection):
    """Two things that are better in the synchronous client."""

    def pack_command(self, *args: Any) -> list[bytes]:
        # In C, as there: a call that carries a batch has thousands of arguments. A name of two words is two of them.
        name, *others = args
        try:
            return [hiredis.pack_command((*str(name).split(), *others))]
        except TypeError as error:
            raise redis.DataError(str(error)) from error

    # uvloop has words of its own for a connection that is closed while it is written to.
    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        try:
            await super().send_packed_command(command, check_health)
        except RuntimeError as error:
            raise redis.ConnectionError(str(error)) from error


class _Connection(_Improved, redis.asyncio.Connection):
    pass


class _TlsConnection(_Improved, redis.asyncio.SSLConnection):
    pass


def make_async_redis(settings: Settings) -> redis.asyncio.Redis:
    """The same client for the processes that run on one event loop."""
    client = redis.asyncio.Redis.from_url(
        settings.redis_url,
        decode_responses=True,
        socket_timeout=settings.redis_timeout,
        socket_connect_timeout=settings.redis_timeout,
        retry=AsyncRetry(NoBackoff(), 0),
    )
    # Not an argument: for rediss:// from_url would put its own in its place.
    client.connection_pool.connection_class = _TlsConnection if settings.redis_url.startswith("rediss") else _Connection
    return client
