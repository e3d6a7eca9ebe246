"""The files that install and start the service agree with one another."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ops.provider.__main__ import _options as provider_options

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "requirements-runtime.lock", "requirements-build.lock")

Pins = dict[str, tuple[str, set[str]]]
"""Name of a package to its version and the hashes of its files."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def procfile() -> dict[str, str]:
    lines: dict[str, str] = {}
    for line in read("Procfile").splitlines():
        match = re.fullmatch(r"([a-z]+): (\S.*\S)", line)
        assert match, f"not a Procfile line: {line!r}"
        assert match[1] not in lines, f"named twice: {match[1]}"
        lines[match[1]] = match[2]
    return lines


def compose_services() -> dict[str, str]:
    """Each service's own lines. Relies on the file's two-space layout, so that no YAML package is needed."""
    section = read("docker-compose.yml").split("\nservices:\n")[1].split("\nvolumes:\n")[0]
    parts = re.split(r"^  ([a-z]+):\n", section, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def compose_commands() -> dict[str, str]:
    found = {name: re.findall(r"^    command: (.+)$", body, re.MULTILINE) for name, body in compose_services().items()}
    return {name: commands[0] for name, commands in found.items() if commands}


def pins(lock: str) -> Pins:
    """A lock file for pip, one requirement after the other; markers do not matter here."""
    result: Pins = {}
    for block in re.split(r"^(?=\S)", read(lock), flags=re.MULTILINE):
        if not block or block.startswith("#"):
            continue
        match = re.match(r"([a-z0-9-]+)==(\S+)", block)
        assert match, f"{lock}: not a pinned requirement: {block.splitlines()[0]!r}"
        result[match[1]] = (match[2], set(re.findall(r"--hash=(sha256:[0-9a-f]{64})(?=\s)", block)))
    return result


@cache
def uv_packages() -> list[dict[str, Any]]:
    packages: list[dict[str, Any]] = tomllib.loads(read("uv.lock"))["package"]
    return packages


def uv_pins() -> Pins:
    return {
        package["name"]: (
            package["version"],
            {file["hash"] for file in [*package.get("wheels", []), *filter(None, [package.get("sdist")])]},
        )
        for package in uv_packages()
        if "registry" in package["source"]
    }


def needs(group: str | None) -> set[str]:
    """What the service (None) or one dependency group needs, and what that needs in turn, by uv.lock."""
    by_name = {package["name"]: package for package in uv_packages()}
    project = by_name["fairlane"]
    own = project["dependencies"] if group is None else project["dev-dependencies"][group]
    waiting: list[dict[str, Any]] = list(own)
    seen: set[str] = set()
    extras_seen: set[tuple[str, str]] = set()
    while waiting:
        need = waiting.pop()
        package = by_name[need["name"]]
        if need["name"] not in seen:
            seen.add(need["name"])
            waiting += package.get("dependencies", [])
        for extra in need.get("extra", []):
            if (need["name"], extra) not in extras_seen:
                extras_seen.add((need["name"], extra))
                waiting += package["optional-dependencies"].get(extra, [])
    return seen


def test_procfile_has_exactly_the_six_processes() -> None:
    assert list(procfile()) == ["release", "web", "lanes", "charges", "sweep", "flower"]


def test_procfile_lines_are_plain_commands() -> None:
    for name, command in procfile().items():
        assert not re.search(r"[;&|<>`$()]", command), f"{name} needs a shell"


def test_lanes_and_charges_share_the_queues_without_overlap() -> None:
    lines = procfile()
    assert "--exclude-queues charges " in lines["lanes"]
    assert "--queues charges " in lines["charges"]
    assert "--exclude-queues" not in lines["charges"]


def test_compose_runs_the_lines_of_the_procfile() -> None:
    commands = compose_commands()
    lines = procfile()
    assert commands.pop("migrate") == lines.pop("release")
    assert {name: commands[name] for name in lines} == lines
    assert set(commands) - set(lines) == {"valkey", "provider"}


def test_compose_starts_the_provider_with_a_command_it_takes_and_asks_its_port() -> None:
    service = compose_services()["provider"]
    python, dash_m, module, *words = shlex.split(compose_commands()["provider"])
    assert (python, dash_m, module) == ("python", "-m", "ops.provider")
    try:
        options = provider_options().parse_args(words)
    except SystemExit:
        pytest.fail("the provider does not take these options; what it says is on standard error")
    # The image's user owns no folder, and may write to this one.
    assert options.ledger.parent == Path("/tmp")
    assert f"urlopen('http://127.0.0.1:{options.port}/healthz', timeout=4)" in service


def test_compose_migrates_once_and_before_everything_else() -> None:
    services = compose_services()
    assert list(compose_commands().values()).count("fairlane migrate") == 1
    assert '\n    restart: "no"\n' in services["migrate"]
    shared = read("docker-compose.yml").split("x-process: &process\n")[1].split("\nservices:\n")[0]
    assert "    migrate:\n      condition: service_completed_successfully\n" in shared
    for name in ("web", "lanes", "charges", "sweep", "flower"):
        assert services[name].startswith("    <<: *process\n"), name
        assert "depends_on:" not in services[name], f"{name} would not wait for the migration"


def test_compose_publishes_the_web_only_and_flower_on_loopback() -> None:
    published = {
        name: re.findall(r'^      - "(.+:\d+)"$', body, re.MULTILINE)
        for name, body in compose_services().items()
        if "    ports:\n" in body
    }
    assert set(published) == {"web", "flower"}
    assert all(port.startswith("127.0.0.1:") for port in published["flower"])


def test_compose_has_no_secret_with_a_default() -> None:
    for variable, rest in re.findall(r"\$\{([A-Z_]+)(.*?)\}", read("docker-compose.yml")):
        if re.search(r"PASSWORD|KEYS|AUTH|SECRET", variable):
            assert rest.startswith(":?"), f"{variable} must be required"


def test_the_lock_for_pip_is_the_lock_of_uv() -> None:
    assert pins("requirements.lock") == uv_pins()


@pytest.mark.parametrize(("lock", "group"), [("requirements-runtime.lock", None), ("requirements-build.lock", "build")])
def test_the_locks_of_the_image_hold_what_they_are_for(lock: str, group: str | None) -> None:
    needed = needs(group)
    assert pins(lock) == {name: pin for name, pin in uv_pins().items() if name in needed}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_has_hashes_and_no_address(lock: str) -> None:
    assert pins(lock)
    for name, (_, hashes) in pins(lock).items():
        assert hashes, f"{lock}: {name} has no hash"
    assert "://" not in read(lock), "a lock names no registry: pip's own settings choose it"
    assert not re.search(r"^-", read(lock), re.MULTILINE), "a lock holds requirements, no options"


def test_every_locked_package_comes_as_a_wheel() -> None:
    # The Makefile installs with --only-binary: a source would fetch build tools that no lock knows.
    assert [p["name"] for p in uv_packages() if "registry" in p["source"] and not p.get("wheels")] == []


def test_make_help_lists_every_command_with_a_sentence() -> None:
    result = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,  # generous: it only prints
    )  # fmt: skip
    listed = dict(re.findall(r"^  make (\S+) +(\S.*\.)$", result.stdout, re.MULTILINE))
    assert len(listed) == len(result.stdout.splitlines())
    phony = re.search(r"^\.PHONY: (.+)$", read("Makefile"), re.MULTILINE)
    assert phony
    targets = re.findall(r"^([a-z]+):(?!=)", read("Makefile"), re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split()) == sorted(targets)


def test_ci_runs_the_tests_lint_and_types() -> None:
    assert re.findall(r"^make --no-print-directory (\w+)$", read(".ci/run"), re.MULTILINE) == [
        "test",
        "lint",
        "types",
    ]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_dockerignore_lets_through_what_the_dockerfile_copies() -> None:
    wanted = {
        source
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", read("Dockerfile"), re.MULTILINE)
        for source in sources.split()
    }
    allowed = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert {source.split("/")[0] for source in wanted} == allowed
    for source in wanted:
        assert (ROOT / source).exists(), source
