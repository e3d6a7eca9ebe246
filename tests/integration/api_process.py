"""An API process of a test's own, whose log it can read; and HTTP byte by byte."""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.embedded.ports import free_port
from tests.processes.process import OwnedProcess, wait_for

ROOT = Path(__file__).parents[2]
#: Seconds for anything that happens at once on an idle machine.
BOUND = 30.0


@dataclass(frozen=True)
class ApiProcess:
    """A running API and what it wrote."""

    url: str
    process: OwnedProcess

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of this event, in order."""
        found = []
        for line in self.process.logs().splitlines():
            # Others may write plain text; what is ours is JSON.
            if line.startswith("{"):
                event = json.loads(line)
                if event.get("event") == name:
                    found.append(event)
        return found

    def wait_for_event(self, name: str, **values: Any) -> dict[str, Any]:
        """The first log line of this event with these values, once it is there."""

        def matching() -> list[dict[str, Any]]:
            return [event for event in self.events(name) if values.items() <= event.items()]

        assert wait_for(lambda: bool(matching()), BOUND), f"no {name} {values} in:\n{self.process.logs()[-3_000:]}"
        return matching()[0]


@contextmanager
def api_process(
    environment: Mapping[str, str], directory: Path, *, before: str = "", ready: str = "/readyz", **settings: str
) -> Iterator[ApiProcess]:
    """`python -m producers` with these settings, named as in `shared.settings`.

    `before` is Python that runs first in the process.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = OwnedProcess(
        command(before),
        log=directory / "api.log",
        env={**environment, **variables(settings), "FAIRLANE_PORT": str(port)},
        cwd=ROOT,
        name="api",
    )
    with process:
        process.wait_ready(lambda: _answers(f"{url}{ready}"))
        yield ApiProcess(url, process)


def command(before: str = "") -> list[str]:
    """How an API process is started, after this Python if there is some."""
    if not before:
        return [sys.executable, "-m", "producers"]
    return [sys.executable, "-c", f"import sys; {before}; from producers.__main__ import main; sys.exit(main())"]


def variables(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings as environment variables."""
    return {f"FAIRLANE_{name.upper()}": value for name, value in settings.items()}


@dataclass(frozen=True)
class RawAnswer:
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def slug(self) -> str:
        """The kind of problem; fails if it is none."""
        assert self.headers["content-type"] == "application/problem+json", self
        problem = json.loads(self.body)
        assert problem["status"] == self.status
        return str(problem["type"]).removeprefix("/problems/")


class Connection:
    """A connection whose bytes the test writes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, text: str | bytes) -> None:
        """Send without waiting; a peer that is gone is no error."""
        if not self._writer.is_closing():
            self._writer.write(text.encode() if isinstance(text, str) else text)

    def end(self) -> None:
        """Send the end of our side; the other stays open."""
        self._writer.write_eof()

    async def answer(self) -> RawAnswer:
        """The next answer. AssertionError when the connection ends instead, TimeoutError after a while."""
        async with asyncio.timeout(BOUND):
            try:
                head = await self._reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                raise AssertionError("the connection ended without an answer") from error
            status_line, *lines = head.decode().rstrip("\r\n").split("\r\n")
            headers: dict[str, str] = {}
            for line in lines:
                name, _, value = line.partition(": ")
                assert name not in headers, f"{name} comes twice"
                headers[name] = value
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
            return RawAnswer(int(status_line.split()[1]), headers, body)

    async def closed(self) -> bytes:
        """What still comes until the server closes the connection."""
        async with asyncio.timeout(BOUND):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""

    async def drip(self, text: str) -> None:
        """Send this again and again, a little at a time, until an answer comes or the connection ends."""
        async with asyncio.timeout(BOUND):
            while not self._reader.at_eof() and not self._came():
                self.send(text)
                await asyncio.sleep(0.05)  # the pace of a slow client

    def _came(self) -> bool:
        return bool(self._reader._buffer)  # type: ignore[attr-defined]  # there is no way to ask without reading


@asynccontextmanager
async def connected(api: ApiProcess | str) -> AsyncIterator[Connection]:
    """A connection to an API."""
    url = api if isinstance(api, str) else api.url
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310  # a URL of this test
            return True
    except OSError:
        return False
