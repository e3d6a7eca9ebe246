"""API keys come and go without a restart, and a bad file takes nobody's key away."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from producers.auth import Authenticator
from producers.key_file import KeyFile
from shared.errors import SettingsError
from shared.settings import ApiKey, Role
from tests.integration.api_process import BOUND, ROOT, ApiProcess, api_process, command, variables
from tests.integration.http_calls import call

#: As if a second took an hour: only SIGHUP has the file read.
NEVER_LOOKS = "import producers.key_file as key_file; key_file._LOOK_EVERY = 3600"


def write(path: Path, text: str) -> None:
    """Write as an operator should: another file, renamed."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


async def status_with(api: ApiProcess, secret: str) -> int:
    return (await call("GET", f"{api.url}/v1/items", {"Authorization": f"Bearer {secret}"})).status


async def until_status(api: ApiProcess, secret: str, status: int) -> None:
    async with asyncio.timeout(BOUND):
        while await status_with(api, secret) != status:
            continue


async def test_keys_of_the_file_come_and_go_while_the_process_runs(
    api_environment: dict[str, str], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    write(keys, "shop:old-9f86d0:shop\n")
    with api_process(api_environment, tmp_path, api_keys_file=str(keys)) as api:
        # Those of the environment hold as well.
        assert [await status_with(api, secret) for secret in ("old-9f86d0", "shop-secret", "new-1b4f0e")] == [
            200,
            200,
            401,
        ]
        write(keys, "shop:old-9f86d0:shop\nshop:new-1b4f0e:shop # the next\n")
        await until_status(api, "new-1b4f0e", 200)
        assert await status_with(api, "old-9f86d0") == 200
        write(keys, "shop:new-1b4f0e:shop\n")
        await until_status(api, "old-9f86d0", 401)
        assert [await status_with(api, secret) for secret in ("new-1b4f0e", "shop-secret")] == [200, 200]
        # Four of them are the environment's.
        assert [event["keys"] for event in api.events("api_keys_changed")] == [6, 5]

        for content, trouble in (
            ("shop:x:shop\nshop:bad-2c26b4:buyer", "line 2 is not name:secret:role with the role shop or admin"),
            ("", "holds no key"),
            (None, "cannot be read (FileNotFoundError)"),
        ):
            if content is None:
                keys.unlink()
            else:
                write(keys, content)
            event = await asyncio.to_thread(api.wait_for_event, "api_keys_kept", trouble=trouble)
            assert (event["level"], event["keys"]) == ("error", 5)
            assert [await status_with(api, secret) for secret in ("new-1b4f0e", "x", "")] == [200, 401, 401]
        write(keys, "shop:last-fcde2b:shop\n")
        await until_status(api, "last-fcde2b", 200)
        assert await status_with(api, "new-1b4f0e") == 401

    written = api.process.logs()
    for secret in ("old-9f86d0", "new-1b4f0e", "bad-2c26b4", "last-fcde2b", "shop-secret"):
        assert secret not in written


async def test_a_hangup_has_the_file_read_at_once(api_environment: dict[str, str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    write(keys, "shop:first:shop\n")
    environment = {name: value for name, value in api_environment.items() if name != "FAIRLANE_API_KEYS"}
    with api_process(environment, tmp_path, before=NEVER_LOOKS, api_keys_file=str(keys)) as api:
        assert [await status_with(api, secret) for secret in ("first", "shop-secret")] == [200, 401]
        write(keys, "shop:second:shop\n")
        api.process.send_signal(signal.SIGHUP)
        await until_status(api, "second", 200)
        assert await status_with(api, "first") == 401


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "FAIRLANE_API_KEYS: is not set"),
        ("shop:hidden-secret", "FAIRLANE_API_KEYS_FILE: line 1 is not name:secret:role"),
    ],
)
def test_without_a_key_no_process_starts(
    api_environment: dict[str, str], tmp_path: Path, content: str | None, told: str
) -> None:
    environment = {name: value for name, value in api_environment.items() if name != "FAIRLANE_API_KEYS"}
    environment["FAIRLANE_PORT"] = "0"
    if content is not None:
        (tmp_path / "keys").write_text(content)
        environment |= variables({"api_keys_file": str(tmp_path / "keys")})
    ended = subprocess.run(command(), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"fairlane: {told}")
    assert "hidden-secret" not in ended.stderr


class Remembering(Authenticator):
    """Remembers which secrets it was given, each time."""

    def __init__(self, api_keys: Iterable[ApiKey] = ()) -> None:
        self.given: list[dict[str, ApiKey]] = []
        super().__init__(api_keys)

    def replace(self, api_keys: Iterable[ApiKey]) -> None:
        self.given.append({key.secret: key for key in api_keys})
        super().replace(self.given[-1].values())


def loaded(path: Path, *others: ApiKey) -> dict[str, ApiKey]:
    """The keys of a file by their secrets."""
    authenticator = Remembering(others)
    KeyFile(path, others, authenticator).load()
    return authenticator.given[-1]


async def test_a_file_that_is_just_being_written_takes_nobodys_key_away(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("shop:s1:shop\nshop:s2:shop\n")
    authenticator = Remembering()
    file = KeyFile(path, (), authenticator)
    file.load()
    authenticator.given.clear()

    with path.open("w") as writer:
        for line in ("shop:s1:shop\n", "shop:s3:shop\n", "shop:s2:shop\n"):
            await file.look()
            writer.write(line)
            writer.flush()
    await file.look()
    # The same as before it was written is nothing new either.
    assert authenticator.given == []
    await file.look()
    await file.look()
    assert [sorted(keys) for keys in authenticator.given] == [["s1", "s2", "s3"]]

    path.write_text("shop:s3:shop\n")
    await file.look(at_once=True)
    assert [sorted(keys) for keys in authenticator.given[1:]] == [["s3"]]


def test_the_file_has_lines_commas_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(
        b"\xef\xbb\xbf# who may call\r\n\r\nshop:s1:shop, shop:s#2:shop\r\n  ops:s3:admin\t# us,and:them:shop\r\n"
    )
    assert loaded(path) == {
        "s1": ApiKey("shop", "s1", Role.SHOP),
        "s#2": ApiKey("shop", "s#2", Role.SHOP),
        "s3": ApiKey("ops", "s3", Role.ADMIN),
    }


def test_a_key_may_be_in_both_places_but_not_as_another(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("shop:s1:shop\n")
    assert list(loaded(path, ApiKey("shop", "s1", Role.SHOP), ApiKey("ops", "s2", Role.ADMIN))) == ["s1", "s2"]
    with pytest.raises(SettingsError, match="another name or role"):
        loaded(path, ApiKey("shop", "s1", Role.ADMIN))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a:same:shop\nb:same:shop", "line 2 repeats a secret"),
        (b"# nobody", "holds no key"),
        (b"a:\xff:shop", "is not UTF-8"),
        (b"a:s:shop\n" + b"#" * 1_100_000, "has more than 1,048,576 bytes"),
    ],
)
def test_a_file_with_a_mistake_is_not_taken(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=told):
        loaded(path)
