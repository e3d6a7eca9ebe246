"""API keys in a file, which is read again when it changes: keys come and go without a restart.

    # who may call
    shop:9f86d081884c7d65:shop
    shop:1b4f0e9851971998:shop      # replaces the one above; both hold until that is taken away
    ops:2c26b46b68ffc68f:admin

One `name:secret:role` per line, or several between commas; from a `#` at the start of a line or after a space it is a
comment. A file that cannot be read, has a mistake or holds no key at all changes nothing: the keys there are go on, and
the log says what is wrong with it, without a secret.

A file that is just being written may be valid and hold fewer keys. So another content is acted upon only when two looks
running, a second apart, have seen it; after SIGHUP at once, as whoever sends that says that the file is ready. Still,
whoever may take longer than that between two lines should write another file and rename it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from producers.auth import Authenticator
from shared.errors import SettingsError
from shared.settings import PREFIX, ApiKey, Settings, parse_api_key

log = structlog.get_logger()

#: Seconds between two looks, and a program writes a file in less. Whoever takes a key away waits for two of them: no
#: longer than it takes to look at the log.
_LOOK_EVERY: Final = 1.0
#: Bytes of a file: ten thousand keys, and not somebody's disk image by mistake.
_LARGEST: Final = 1024 * 1024

_SETTING: Final = f"{PREFIX}API_KEYS_FILE"
_COMMENT: Final = re.compile(r"(^|\s)#.*")


class KeyFile:
    """Keeps an authenticator's keys those of a file and of the setting `API_KEYS` together."""

    def __init__(self, path: Path, others: Iterable[ApiKey], authenticator: Authenticator) -> None:
        self._path = path
        self._others = tuple(others)
        self._authenticator = authenticator
        #: What was last acted upon, and what the last look saw.
        self._known: bytes | str | None = None
        self._seen: bytes | str | None = None
        self._asked = asyncio.Event()

    def load(self) -> None:
        """Read the file at a process's start. Raises SettingsError, in one line, when it cannot be used."""
        seen = self._read()
        try:
            self._authenticator.replace(self._keys(seen))
        except ValueError as error:
            raise SettingsError(f"{_SETTING}: {error}") from None
        self._known = self._seen = seen

    async def look(self, *, at_once: bool = False) -> None:
        """Read the file; when it is another than that of last time, take its keys over or log why not.

        Unless this is to be `at_once`, it happens only at the second look running that sees the same.
        """
        # Not on the event loop: a network file system may hang.
        seen = await asyncio.to_thread(self._read)
        before, self._seen = self._seen, seen
        if seen == self._known or (seen != before and not at_once):
            return
        self._known = seen
        try:
            keys = self._keys(seen)
        except ValueError as error:
            log.error("api_keys_kept", file=str(self._path), trouble=str(error), keys=len(self._authenticator))
            return
        self._authenticator.replace(keys)
        log.info("api_keys_changed", file=str(self._path), keys=len(keys))

    def look_now(self) -> None:
        """Have the file acted upon without waiting for the next rounds, for a signal handler of the event loop."""
        self._asked.set()

    async def watch(self) -> None:
        """Look again and again, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY):
                    await self._asked.wait()
            at_once = self._asked.is_set()
            self._asked.clear()
            # Nothing in a look raises one but the log, whose disk may be full. That must not be the end of looking.
            with suppress(OSError):
                await self.look(at_once=at_once)

    def _read(self) -> bytes | str:
        """The file's bytes, or in words why there are none."""
        try:
            with self._path.open("rb") as file:
                content = file.read(_LARGEST + 1)
        except OSError as error:
            return f"cannot be read ({type(error).__name__})"
        return content if len(content) <= _LARGEST else f"has more than {_LARGEST:,} bytes"

    def _keys(self, seen: bytes | str) -> tuple[ApiKey, ...]:
        """All keys that hold with this content. Raises ValueError, which quotes nothing of it."""
        if isinstance(seen, str):
            raise ValueError(seen)
        try:
            text = seen.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8") from None
        keys = {}
        for number, line in enumerate(text.splitlines(), start=1):
            for entry in filter(None, (part.strip() for part in _COMMENT.sub("", line).split(","))):
                key = parse_api_key(entry, f"line {number}")
                if key.secret in keys:
                    raise ValueError(f"line {number} repeats a secret")
                keys[key.secret] = key
        if not keys:
            raise ValueError("holds no key")
        for other in self._others:
            # The same key in both places is one that is moving from one to the other.
            if keys.setdefault(other.secret, other) != other:
                raise ValueError(f"gives a secret of {PREFIX}API_KEYS another name or role")
        return tuple(keys.values())


@asynccontextmanager
async def authenticator_of(settings: Settings) -> AsyncIterator[tuple[Authenticator, KeyFile | None]]:
    """The authenticator of this process, and the file that its keys follow while this is entered, if there is one.

    Raises SettingsError when the file cannot be used.
    """
    authenticator = Authenticator(settings.api_keys)
    if settings.api_keys_file is None:
        yield authenticator, None
        return
    file = KeyFile(settings.api_keys_file, settings.api_keys, authenticator)
    file.load()
    watcher = asyncio.create_task(file.watch(), name="api-key-file")
    try:
        yield authenticator, file
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
