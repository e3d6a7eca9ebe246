"""The README's transcript, run as printed against `fairlane dev`; and the rules by which it is read."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from ops.embedded.ports import free_port
from tests.acceptance.service import READY_WITHIN, RELEASE_WITHIN, Service, status_of
from tests.acceptance.shop import Shop
from tests.acceptance.transcript import Step, TranscriptError, matches, play, read_transcript
from tests.processes.process import OwnedProcess, processes_for, wait_for

#: Where `fairlane dev` serves, and so what the README says.
DEV = "http://127.0.0.1:8000"


FAIRLANE = str(Path(sys.executable).with_name("fairlane"))

#: From SIGINT to the end. The processes get 20 s, then the provider and the servers are stopped.
STOPPED_WITHIN = 60.0


@pytest.mark.timeout(240)  # all the waits below, one after the other
async def test_the_transcript_of_the_readme_is_true_of_dev(project_root: Path, tmp_path: Path) -> None:
    text = (project_root / "README.md").read_text(encoding="utf-8")
    assert any(DEV in step.command for step in read_transcript(text)), f"the transcript does not ask {DEV}"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    dev = OwnedProcess(
        [FAIRLANE, "dev"],
        log=tmp_path / "dev.log",
        # By the second one everything that dev starts is known, wherever it runs.
        env={"FAIRLANE_PORT": str(port), "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
    )
    with dev:
        dev.wait_ready(lambda: status_of(f"{url}/readyz") == 200, RELEASE_WITHIN + READY_WITHIN)
        # The API is ready before the workers are: on a busy machine the reader would wait longer than the transcript.
        async with aiohttp.ClientSession() as session:
            shop = Shop(session, url)
            await shop.put_item("first", stock=1)
            bought = await shop.buy_insisting("first")
            assert (await shop.final(bought.body["id"], READY_WITHIN))["status"] == "confirmed"
        play(read_transcript(text.replace(DEV, url)), tmp_path)
        assert len(processes_for(tmp_path)) > 1
        dev.send_signal(signal.SIGINT)
        assert wait_for(lambda: not dev.alive, STOPPED_WITHIN), dev.logs()
        assert processes_for(tmp_path) == []
        assert dev.kill() == 130


EXAMPLE = f"""
$ not this
<!-- transcript:begin -->
Words.
```console
$ NAME=mug
$ curl -s -X PUT {DEV}/v1/items/$NAME-of-the-example \\
>   -H 'Authorization: Bearer admin-secret' -H 'Content-Type: application/json' \\
>   -d '{{"name": "Mug", "stock": 10, "price": 1200, "currency": "EUR"}}'
{{"sku":"mug-of-the-example","name":"Mug",…}}
$ curl -si {DEV}/healthz
HTTP/1.1 200 OK
…
{{"status":"ok"}}
```
<!-- transcript:end -->
"""


def test_a_transcript_is_read_and_played(service: Service, tmp_path: Path) -> None:
    steps = read_transcript(EXAMPLE.replace(DEV, service.url))
    assert [(step.line, step.only_asks, len(step.expected)) for step in steps] == [
        (6, True, 0),
        (7, False, 1),
        (11, True, 3),
    ]
    play(steps, tmp_path)


def test_a_difference_is_shown_with_its_place(service: Service, tmp_path: Path) -> None:
    wrong = EXAMPLE.replace(DEV, service.url).replace('"sku":"mug', '"sku":"cup')
    with pytest.raises(TranscriptError) as difference:
        play(read_transcript(wrong), tmp_path)
    shown = str(difference.value)
    assert shown.startswith("README.md:7: ")
    assert "\n  $ curl -s -X PUT" in shown
    expected, printed = shown.split("\nprinted:\n")
    assert '  | {"sku":"cup-of-the-example"' in expected
    assert printed.startswith('  | {"sku":"mug-of-the-example"')


def test_a_file_without_a_transcript_is_told() -> None:
    with pytest.raises(TranscriptError, match="no commands"):
        read_transcript("```console\n$ true\n```\n")


@pytest.mark.parametrize(
    ("expected", "output", "same"),
    [
        (("a…c",), "abc\n", True),
        (("a…c",), "ac", True),
        (("a…c",), "a\nc", False),
        (("a.c",), "abc", False),
        (("a", "…", "b"), "a\nb\n", True),
        (("a", "…", "b"), "a\r\n\r\nx\r\ny\r\nb\r\n", True),
        (("a",), "a\nb", False),
        ((), "", True),
        ((), "a", False),
    ],
)
def test_an_ellipsis_matches_anything(expected: tuple[str, ...], output: str, same: bool) -> None:
    assert matches(expected, output) is same


async def test_a_question_is_repeated_until_it_is_answered(tmp_path: Path) -> None:
    count = tmp_path / "count"
    play([Step(1, f"echo x >> {count}; wc -l < {count}", ("3",))], tmp_path)
    assert len(count.read_text().splitlines()) == 3
