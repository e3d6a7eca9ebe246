"""What a broken connection to Redis is called, whichever event loop noticed it."""

from __future__ import annotations

import pytest
import redis

from shared.redis_clients import make_async_redis
from shared.settings import Settings


class _Closed:
    """What uvloop leaves of a connection that the other side closed."""

    def writelines(self, _: object) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    def close(self) -> None:
        return

    async def wait_closed(self) -> None:
        return


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_a_connection_closed_while_it_is_written_to_is_a_connection_error(scheme: str) -> None:
    client = make_async_redis(Settings(database_url="postgresql://u@h/d", redis_url=f"{scheme}://127.0.0.1:9/0"))
    connection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    connection._reader, connection._writer = object(), _Closed()
    with pytest.raises(redis.ConnectionError):
        await connection.send_packed_command(b"PING", check_health=False)
    await client.aclose()
