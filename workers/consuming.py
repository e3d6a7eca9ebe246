"""How a worker comes back to a broker that was away, and how often it tells who watches."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import Any

from celery.worker.consumer import Consumer
from kombu import Connection
from kombu.asynchronous import Hub

#: Seconds between two tries. Celery's own pauses grow by 2 s up to 30 s: a sale would stand still for as long after the
#: broker is back. A refused connection costs next to nothing, and a hanging one has its own timeout.
_PAUSE = 1


#: Seconds between two tellings of what became of tasks. Celery tells of each at once, three times a task, and each time
#: is a round trip: a third of what a worker's main process did in a sale. A person who watches sees no difference, and
#: what waits when a broker is lost is lost with it.
_EVENTS_EVERY = 0.25

#: What kombu raises now and then when a broker is lost in the middle of a message. Celery ends the worker at an error
#: it does not know; here it connects anew and finds all in order.
_LOST_AS_WELL = (AttributeError,)


class PromptConsumer(Consumer):
    """Celery's consumer, with tries to reconnect that stay close to each other and do not end. Tells events by the
    group.
    """

    connection_errors: tuple[type[BaseException], ...]
    hub: Hub | None
    event_dispatcher: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connection_errors = (*self.connection_errors, *_LOST_AS_WELL)
        self._events_told_at = 0.0

    def on_send_event_buffered(self) -> None:  # type: ignore[override]  # the stubs have it as a property
        """An event waits to be sent: with all that come within the next moment."""
        # Judged by the clock and not by whether a telling is due: those that are due are forgotten with a connection.
        if self.hub and (now := time.monotonic()) >= self._events_told_at:
            self._events_told_at = now + _EVENTS_EVERY
            # On the hub's own thread, and waking it: with a pool of threads, events come from those.
            self.hub.call_soon(self.hub.call_later, _EVENTS_EVERY, self._tell_events)

    def _tell_events(self) -> None:
        if self.event_dispatcher:
            self.event_dispatcher.flush()

    def shutdown(self) -> None:
        """The last task has ended, and with it everything that was due: what waits is told now."""
        self._tell_events()
        super().shutdown()

    def ensure_connected(self, conn: Connection) -> Connection:
        """Connect, however long it takes."""
        # The pauses are arguments of kombu's method, which Celery calls without them.
        conn.ensure_connection = partial(  # type: ignore[method-assign]
            conn.ensure_connection, interval_start=_PAUSE, interval_step=0, interval_max=_PAUSE
        )
        connected: Connection = super().ensure_connected(conn)
        return connected

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Put the lost connection away."""
        # kombu means to give unacknowledged messages back on the connection that it has just emptied, and fails. They
        # are claim checks, which the sweep repeats: nothing is given back. Should kombu fail all the same, Celery has
        # let go of the connection by then.
        channel = getattr(getattr(self, "connection", None), "_default_channel", None)
        if channel is not None:
            channel.do_restore = False
        with suppress(AttributeError):
            super().on_connection_error_after_connected(exc)
