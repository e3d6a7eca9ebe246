"""`Prefer: wait`, and what a client says it has seen."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from producers.conditions import Seen, last_event, seen_by
from producers.preferences import wait_seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (["wait=5"], 5),
        (["Wait = 5"], 5),
        (['wait="5"'], 5),
        (["wait=0"], 0),
        (["wait=007"], 7),
        (["wait=30"], 30),
        (["wait=31"], 30),
        (["wait=" + "9" * 5_000], 30),
        (["wait=" + "0" * 5_000 + "1"], 1),
        (["respond-async, wait=10"], 10),
        (["wait=10;foo=bar; x"], 10),
        (["respond-async", "return=minimal, wait=10"], 10),
        (["wait=10", "wait=20"], 10),
        (["wait=3, wait=20"], 3),
        (['note="a, wait=7; \\" b", wait=9'], 9),
        (['note="a, wait=7'], None),
        ([], None),
        ([""], None),
        (["wait"], None),
        (["wait="], None),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (["wait=5s"], None),
        (["wait=x", "wait=5"], None),
        (["wait=\u0665"], None),
        (['wait="5'], None),
        (["waiting=5"], None),
        (["return=minimal;wait=5"], None),
    ],
)
def test_how_long_a_client_asks_to_wait(headers: list[str], seconds: int | None) -> None:
    assert wait_seconds(headers) == seconds


def request(*headers: tuple[str, str]) -> Request:
    return Request({"type": "http", "headers": [(name.lower().encode(), value.encode()) for name, value in headers]})


@pytest.mark.parametrize(
    ("values", "tags", "revision"),
    [
        ([], set(), 0),
        (['"3-0"'], {'"3-0"'}, 3),
        (['W/"3-12", "10-0"', '"4-4"'], {'"3-12"', '"10-0"', '"4-4"'}, 10),
        (["*"], {"*"}, 0),
        (['"a,b" , "3-0"'], {'"a,b"', '"3-0"'}, 3),
        (['"99999999999999-0"'], {'"99999999999999-0"'}, 0),
        (["3-0"], set(), 0),
        (['"3-0'], set(), 0),
    ],
)
def test_what_a_client_has_seen(values: list[str], tags: set[str], revision: int) -> None:
    assert seen_by(request(*(("If-None-Match", value) for value in values))) == Seen(frozenset(tags), revision)


def test_another_revision_is_news_and_another_place_in_the_line_is_not() -> None:
    seen = Seen(frozenset({'"3-12"'}), 3)
    assert [seen.misses(revision) for revision in (2, 3, 4)] == [True, False, True]
    assert not Seen(frozenset(), 0).misses(3)
    assert not Seen(frozenset({"*"}), 0).misses(3)


@pytest.mark.parametrize(("value", "revision"), [("7", 7), ("", 0), ("-1", 0), ("9" * 10, 0), ("7 ", 0), ("x", 0)])
def test_the_last_event_a_client_has_seen(value: str, revision: int) -> None:
    assert last_event(request(("Last-Event-ID", value))) == revision
    assert last_event(request()) == 0
