"""An answer in one write: its head and its body, where both are there before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from uvicorn._types import ASGISendEvent, HTTPResponseStartEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

#: What may be in a line of a head; and the fields that decide on the connection.
_LINE_BYTES: Final = bytes(byte for byte in range(256) if byte >= ord(" ") and byte != 0x7F)
_CONNECTION_FIELDS: Final = frozenset((b"connection", b"transfer-encoding"))


class WholeAnswer(RequestResponseCycle):
    """A request and its answer, which goes out whole, head and body, in one write.

    uvicorn writes them one by one, and uvloop hands each to the kernel at once: twice the work for both ends. It also
    looks at each field of a head by itself, where a look at all of them together is enough.
    """

    #: The head of an answer, until its body comes.
    _head: bytes | None = None

    async def send(self, message: ASGISendEvent) -> None:
        if self._head is not None:
            await self._send_with_head(message)
        elif message["type"] != "http.response.start" or not self._keep_head(message):
            await super().send(message)

    def _keep_head(self, message: HTTPResponseStartEvent) -> bool:
        """Whether this is the head of an answer whose body need only be put behind it. It is kept until then."""
        if self.response_started or self.disconnected:
            return False
        plain = _plain_head([*self.default_headers, *message.get("headers", ())])
        if plain is None:
            return False
        lines, self.expected_content_length = plain
        self.chunked_encoding = False
        self.response_started = True
        self.waiting_for_100_continue = False
        end = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        self._head = STATUS_LINE[message["status"]] + lines + end
        return True

    async def _send_with_head(self, message: ASGISendEvent) -> None:
        head, self._head = self._head, None
        if self.disconnected or head is None:
            return
        body = message.get("body", b"") if message["type"] == "http.response.body" else None
        if (
            body is None
            or message.get("more_body", False)
            or len(body) != self.expected_content_length
            or self.flow.write_paused
            or self.scope["method"] == "HEAD"
        ):
            self.transport.write(head)
            await super().send(message)
            return
        self.transport.write(head + body)
        self.expected_content_length = 0
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


def _plain_head(headers: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, int] | None:
    """The lines of these fields, and the length of the body they announce.

    None if they announce none, if a field decides on the connection, or if one has what may not be sent: uvicorn has
    the answers to that. Names are in lower case, as all who make headers here write them.
    """
    fields = dict(headers)
    length = fields.get(b"content-length", b"")
    if not length.isdigit() or not _CONNECTION_FIELDS.isdisjoint(fields):
        return None
    lines = b"\r\n".join([*map(b": ".join, headers), b""])
    # A line break in a value would begin a field, or an answer, of whoever brought the value in.
    if lines.translate(None, _LINE_BYTES) != b"\r\n" * len(headers):
        return None
    return lines, int(length)
