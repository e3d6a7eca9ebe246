"""The README's transcript, run as printed against the running service; and the rules by which it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.service import Service
from tests.acceptance.transcript import Step, TranscriptError, matches, play, read_transcript

#: Where `fairlane dev` serves, and so what the README says.
DEV = "http://127.0.0.1:8000"


def test_the_transcript_of_the_readme_is_true(service: Service, project_root: Path, tmp_path: Path) -> None:
    text = (project_root / "README.md").read_text(encoding="utf-8")
    steps = read_transcript(text)
    assert any(DEV in step.command for step in steps), f"the transcript does not ask {DEV}"
    play(read_transcript(text.replace(DEV, service.url)), tmp_path)


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
