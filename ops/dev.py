"""`fairlane dev`: every process on embedded servers and the sandbox provider, with its data in `.fairlane/`."""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ops import stack
from ops.embedded import EmbeddedServers
from ops.embedded.ports import LOOPBACK, free_port
from ops.interruption import orderly_end
from ops.sandbox import ProviderProcess
from shared.errors import FairlaneError, SettingsError
from shared.settings import load_settings

DIRECTORY = Path(".fairlane")

#: Keys everybody knows: this is for one's own machine, on the loopback address.
API_KEYS = "shop:shop-secret:shop,admin:admin-secret:admin"

_PORT = 8000
#: A start takes a few seconds. After this long the box would only mislead.
_READY_WITHIN = 60.0
_LOOK_EVERY = 0.2


class DirectoryInUseError(FairlaneError):
    """Another `fairlane dev` runs in this directory."""


def dev(directory: Path = DIRECTORY) -> int:
    """Run everything until Ctrl-C; returns the exit code as `stack.up` does. Data stays in `directory`.

    Raises DirectoryInUseError when another one runs there, EmbeddedError, ProviderError or SettingsError when something
    cannot start.
    """
    stack.find_procfile()
    with (
        orderly_end(),
        _owned(directory),
        EmbeddedServers(directory) as servers,
        ProviderProcess(directory / "provider") as provider,
    ):
        environment = _environment(servers, provider)
        _check(environment)
        threading.Thread(target=_announce, args=(environment,), daemon=True).start()
        code = stack.up(environment)
        # Everything is to be put away: a second Ctrl-C must not stop that in the middle.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return code


def _environment(servers: EmbeddedServers, provider: ProviderProcess) -> dict[str, str]:
    """This process's environment with what dev decides, and defaults for what the user did not."""
    environment = dict(os.environ)
    environment.pop("FAIRLANE_BROKER_URL", None)
    environment |= servers.environment() | {"FAIRLANE_PAYMENT_URL": provider.url}
    defaults = {
        "FAIRLANE_API_KEYS": lambda: API_KEYS,
        "FAIRLANE_FLOWER_AUTH": lambda: f"dev:{secrets.token_urlsafe(9)}",
        "FAIRLANE_FLOWER_PORT": lambda: str(free_port()),
        "FAIRLANE_PORT": _default_port,
    }
    for name, default in defaults.items():
        if not environment.get(name):
            environment[name] = default()
    return environment


def _default_port() -> str:
    if not _is_taken(_PORT):
        return str(_PORT)
    port = free_port()
    print(f"fairlane: port {_PORT} is taken; the API listens on {port}", file=sys.stderr)
    return str(port)


def _is_taken(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return True
        return False


def _check(environment: Mapping[str, str]) -> None:
    """Raise SettingsError for settings that cannot work, before any process starts."""
    os.environ.update({name: value for name, value in environment.items() if name.startswith("FAIRLANE_")})
    settings = load_settings(*stack.NEEDED)
    if settings.port and _is_taken(settings.port):
        raise SettingsError(f"FAIRLANE_PORT: port {settings.port} is taken")
    if _is_taken(settings.flower_port):
        raise SettingsError(f"FAIRLANE_FLOWER_PORT: port {settings.flower_port} is taken")


def _announce(environment: Mapping[str, str]) -> None:
    """Print the box once the API is ready."""
    port = environment["FAIRLANE_PORT"]
    api = f"http://{LOOPBACK}:{port}"
    deadline = time.monotonic() + _READY_WITHIN
    while not _answers(f"{api}/readyz"):
        if time.monotonic() > deadline:
            return
        time.sleep(_LOOK_EVERY)
    print(box(api, environment), flush=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 - our own http address
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def box(api: str, environment: Mapping[str, str]) -> str:
    """What a person needs to begin: addresses, keys, and a first request."""
    user, _, password = environment["FAIRLANE_FLOWER_AUTH"].partition(":")
    settings = load_settings()
    rows = [
        f"API docs   {api}/docs",
        f"Flower     http://{LOOPBACK}:{environment['FAIRLANE_FLOWER_PORT']}   user {user}, password {password}",
        *(f"API key    {key.secret}   ({key.name}, role {key.role})" for key in settings.api_keys),
    ]
    admin = next((key.secret for key in settings.api_keys if key.role == "admin"), "ADMIN-KEY")
    first = (
        f"  curl -X PUT {api}/v1/items/mug -H 'Authorization: Bearer {admin}' \\\n"
        "    -H 'Content-Type: application/json' \\\n"
        '    -d \'{"name": "Mug", "stock": 10, "price": 1200, "currency": "EUR"}\''
    )
    width = max(len(row) for row in rows)
    lines = [f"│ {row.ljust(width)} │" for row in rows]
    top, bottom = "┌" + "─" * (width + 2) + "┐", "└" + "─" * (width + 2) + "┘"
    return "\n".join(["", top, *lines, bottom, "A first request (Ctrl-C stops everything):", first, ""])


@contextmanager
def _owned(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; the kernel lets go of it however this process ends."""
    try:
        directory.mkdir(exist_ok=True)
        file = (directory / "dev.lock").open("a+")
    except OSError as error:
        raise FairlaneError(f"{directory.absolute()} cannot be used: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            words = f"another `fairlane dev` runs in {directory.absolute()}" + (f" (process {owner})" if owner else "")
            raise DirectoryInUseError(words) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
