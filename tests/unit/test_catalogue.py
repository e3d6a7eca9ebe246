"""A catalogue file: what is read from a good one, and what is said of every bad line."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from ops.catalogue import BadLine, Catalogue, parse_catalogue, read_catalogue
from ops.demo.crowd import CATALOGUE, HOT

HEADER = "sku,name,stock,price,currency,per_customer,opens_at,closes_at,hold_seconds,waitlist\n"
SHORT = "sku,name,stock,price,currency\n"


def said(catalogue: Catalogue) -> list[str]:
    return [str(one) for one in catalogue.bad]


def test_a_full_line_is_read_with_every_field() -> None:
    catalogue = parse_catalogue(
        HEADER + "mug-1,Enamel mug,40,1250,EUR,2,2026-11-27T09:00:00Z,2026-11-27T11:00:00+01:00,600,false\n"
    )
    assert not catalogue.bad
    (line,) = catalogue.lines
    assert (line.number, line.sku) == (2, "mug-1")
    assert line.terms.name == "Enamel mug"
    assert (line.terms.stock, line.terms.price, line.terms.currency) == (40, 1250, "EUR")
    assert (line.terms.per_customer, line.terms.hold_seconds, line.terms.waitlist) == (2, 600, False)
    assert line.terms.opens_at == datetime(2026, 11, 27, 9, tzinfo=UTC)
    assert line.terms.closes_at == datetime(2026, 11, 27, 10, tzinfo=UTC)


def test_empty_optional_fields_are_the_defaults() -> None:
    (line,) = parse_catalogue(HEADER + "a,A,0,0,EUR,,,,,\n").lines
    assert (line.terms.per_customer, line.terms.hold_seconds, line.terms.waitlist) == (None, None, True)
    assert line.terms.opens_at is None


def test_columns_may_stand_in_any_order_and_optional_ones_be_left_out() -> None:
    (line,) = parse_catalogue("currency,price,stock,name,sku\nEUR,5,3,A,a-1\n").lines
    assert (line.sku, line.terms.stock, line.terms.price) == ("a-1", 3, 5)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_any_line_ends_a_byte_order_mark_and_empty_lines(tmp_path: Path, ends: str) -> None:
    file = tmp_path / "items.csv"
    lines = ["", SHORT.strip(), "", "a,Ä,1,1,EUR", ",,,,", "b,B,x,1,EUR"]
    file.write_bytes(b"\xef\xbb\xbf" + ends.join(lines).encode())
    catalogue = read_catalogue(file)
    assert [(line.number, line.sku, line.terms.name) for line in catalogue.lines] == [(4, "a", "Ä")]
    assert said(catalogue) == ["line 6, stock: is not a whole number"]


def test_a_quoted_name_may_hold_commas_and_lines_are_still_counted_right() -> None:
    catalogue = parse_catalogue(SHORT + '"a","A, with ""quotes""",1,1,EUR\n"b","B\nB",1,1,EUR\nc,C,1,1,eur\n')
    assert catalogue.lines[0].terms.name == 'A, with "quotes"'
    assert [(one.number, one.field) for one in catalogue.bad] == [(3, "name"), (5, "currency")]


def test_every_bad_field_of_every_bad_line_is_named() -> None:
    catalogue = parse_catalogue(
        HEADER
        + "good,Good,1,1,EUR,,,,,\n"
        + "bad sku,,-1,1.5,EURO,0,now,2026-11-27T09:00:00,0,perhaps\n"
        + "good2,Good,1,1,EUR,,,,,\n"
        + "x,X,1,1,EUR,,2026-11-27T09:00:00Z,2026-11-27T08:00:00Z,,\n"
    )
    assert [(one.number, one.field) for one in catalogue.bad] == [
        *((3, name) for name in ("sku", "name", "stock", "price", "currency")),
        *((3, name) for name in ("per_customer", "opens_at", "closes_at", "hold_seconds", "waitlist")),
        (5, ""),
    ]
    assert "closes_at must be after opens_at" in str(catalogue.bad[-1])


@pytest.mark.parametrize(
    "cell", ["1.0", "1e3", "0x10", "1_000", "\u0661", "- 1", "true", "inf", "9" * 21, "9" * 5_000, str(2_000_000_001)]
)
def test_a_stock_that_is_no_possible_number(cell: str) -> None:
    catalogue = parse_catalogue(SHORT + f"a,A,{cell},1,EUR\n")
    assert [(one.number, one.field) for one in catalogue.bad] == [(2, "stock")]


def test_a_bare_number_is_not_a_time() -> None:
    catalogue = parse_catalogue(HEADER + "a,A,1,1,EUR,,1700000000,,,\n")
    assert said(catalogue) == ["line 2, opens_at: is not a time like 2026-11-27T09:00:00Z"]


def test_a_sku_that_comes_twice_names_both_lines() -> None:
    catalogue = parse_catalogue(SHORT + "a,A,1,1,EUR\nb,B,1,1,EUR\na,A,2,1,EUR\n")
    assert said(catalogue) == ["line 4, sku: a is on line 2 already"]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["line 1: the file is empty; it needs a header"]),
        ("\n\n", ["line 1: the file is empty; it needs a header"]),
        ("a,A,1,1,EUR\n", ["lacks the column sku", "unknown column 'EUR'"]),
        ("sku;name;stock;price;currency\n", ["lacks the column sku", "unknown column 'sku;name;stock;price;currency'"]),
        ("sku,name,stock,price\n", ["line 1, header: lacks the column currency"]),
        ("sku,name,stock,price,currency,sku\n", ["has the column sku 2 times"]),
        ("sku,name,stock,price,currency,colour\n", ["unknown column 'colour'"]),
    ],
)
def test_a_wrong_header(text: str, problems: list[str]) -> None:
    catalogue = parse_catalogue(text)
    assert not catalogue.lines
    for problem in problems:
        assert any(problem in one for one in said(catalogue)), said(catalogue)


@pytest.mark.parametrize("row", ["a,A,1,1", "a,A,1,1,EUR,5"])
def test_a_line_with_too_few_or_too_many_fields(row: str) -> None:
    fields = row.count(",") + 1
    assert said(parse_catalogue(SHORT + row)) == [f"line 2: has {fields} fields, the header has 5"]


def test_control_characters_in_a_name() -> None:
    catalogue = parse_catalogue(SHORT + "a,A\x00B,1,1,EUR\n")
    assert [(one.number, one.field) for one in catalogue.bad] == [(2, "name")]


def test_an_open_quote_is_told_where_it_opens() -> None:
    catalogue = parse_catalogue(SHORT + 'a,"A,1,1,EUR\nb,B,1,1,EUR\n')
    assert [one.number for one in catalogue.bad] == [2]
    assert "not CSV" in str(catalogue.bad[0])


def test_bytes_that_are_not_utf8_name_their_line(tmp_path: Path) -> None:
    file = tmp_path / "items.csv"
    file.write_bytes(SHORT.encode() + b"a,A,1,1,EUR\nb,M\xfctze,1,1,EUR\n")
    assert read_catalogue(file).bad == (BadLine(3, "", "is not UTF-8 text"),)


def test_the_demo_sells_about_forty_items_one_of_them_hot() -> None:
    catalogue = read_catalogue(CATALOGUE)
    assert not catalogue.bad
    assert len(catalogue.lines) == 40
    assert {line.sku: line.terms.stock for line in catalogue.lines}[HOT] == 500
