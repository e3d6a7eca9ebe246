"""The body of a charge: the last place where sending can still be refused, and the record of whether it was
sent.

aiohttp keeps the request's head back and writes it together with the first bytes of the body. So this
payload's write is the moment at which a charge is sent, and before it nothing is. (Should a version write the
head earlier: a request whose head announces a body that never follows is incomplete, and the connection is
closed after it.) Everything between the check here and the socket is one synchronous stretch of code: no
other task runs in it.
"""

from __future__ import annotations

import time

from aiohttp import BytesPayload
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import StreamWriter


class NotWritten(Exception):
    """The body was held back. `str()` is the reason for `NotSent`."""


class GuardedBody(BytesPayload):
    """JSON that is written at most once, before `start_by` (`time.monotonic()`), and not once withdrawn."""

    def __init__(self, content: bytes, *, start_by: float) -> None:
        super().__init__(content, content_type="application/json")
        self._start_by = start_by
        self._withdrawn = False
        #: True from just before the first byte goes to the socket: from then on all is doubt.
        self.begun = False
        self.held_back: str | None = None  #: Why the body was not written, once it was asked to and refused.

    def withdraw(self) -> None:
        """From now on nothing is written. What was begun stays begun."""
        self._withdrawn = True

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        self.held_back = self._objection(writer)
        if self.held_back is not None:
            raise NotWritten(self.held_back)
        self.begun = True
        await super().write_with_length(writer, content_length)

    def _objection(self, writer: AbstractStreamWriter) -> str | None:
        if self._withdrawn:
            return "withdrawn"
        if self.begun:
            return "written_before"
        if not isinstance(writer, StreamWriter) or not isinstance(writer.protocol, ResponseHandler):
            return "unknown_writer"
        if writer.transport is None or writer.transport.is_closing():
            return "connection_closed"
        if writer.protocol.should_close:
            # Bytes came in before we asked for anything: they would be read as the reply to this charge.
            return "connection_unclean"
        if time.monotonic() >= self._start_by:
            return "too_late"
        return None
