"""Items from a CSV file: every line is judged, then all are saved in one transaction, or none.

The file is UTF-8, with or without a byte order mark, with any line ends, and with a header. Columns in any order:

| column | value |
|---|---|
| sku, name, currency | required; as in `PUT /v1/items/{sku}` |
| stock, price | required; whole numbers, the price in minor units |
| per_customer, hold_seconds | whole numbers; empty: no limit, the default |
| opens_at, closes_at | times with their zone, `2026-11-27T09:00:00Z`; empty: always open |
| waitlist | `true` or `false`; empty: true |
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from redis import RedisError
from sqlalchemy.ext.asyncio import AsyncConnection

from shared import doors, items
from shared.calling import Caller, lane_call, make_celery
from shared.database import LIMITS, check_lanes, limits, make_async_engine
from shared.errors import StockBelowCommittedError
from shared.items import SKU_PATTERN, ItemTerms, Saved
from shared.redis_clients import make_redis
from shared.settings import Settings

REQUIRED = ("sku", "name", "stock", "price", "currency")
OPTIONAL = ("per_customer", "opens_at", "closes_at", "hold_seconds", "waitlist")
_WHOLE_NUMBERS = frozenset({"stock", "price", "per_customer", "hold_seconds"})
_TRUTH = {"true": True, "false": False}

#: A larger file is not a catalogue: a hundred thousand items take some ten of these.
MAX_BYTES = 64 * 1024 * 1024
#: Digits beyond this are too large for any field; Python refuses to convert thousands of them.
_MAX_DIGITS = 20


@dataclass(frozen=True, slots=True)
class Line:
    """One item of the file, and the number of the line it begins on (the header is usually line 1)."""

    number: int
    sku: str
    terms: ItemTerms


@dataclass(frozen=True, slots=True)
class BadLine:
    """What is wrong with one field of one line; `field` is empty for what concerns the whole line."""

    number: int
    field: str
    problem: str

    def __str__(self) -> str:
        where = f"line {self.number}, {self.field}" if self.field else f"line {self.number}"
        return f"{where}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """A file as it was read: the good lines, and every bad field of every bad line, in the order of the file."""

    lines: tuple[Line, ...]
    bad: tuple[BadLine, ...]


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import came to. With anything in `bad`, nothing was saved."""

    created: int
    changed: int
    bad: tuple[BadLine, ...]


def read_catalogue(path: Path) -> Catalogue:
    """Read and judge a whole file; touches no database. OSError when it cannot be read."""
    if path.stat().st_size > MAX_BYTES:
        return _unreadable(1, f"the file is larger than {MAX_BYTES // 1024 // 1024} MiB")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _unreadable(content.count(b"\n", 0, error.start) + 1, "is not UTF-8 text")
    return parse_catalogue(text)


def parse_catalogue(text: str) -> Catalogue:
    """Judge the text of a catalogue. Empty lines are skipped."""
    rows = _rows(text)
    first = next(rows, None)
    if first is None:
        return _unreadable(1, "the file is empty; it needs a header")
    if isinstance(first, BadLine):
        return Catalogue((), (first,))
    number, header = first
    columns = [column.strip() for column in header]
    problems = _header_problems(columns)
    if problems:
        return Catalogue((), tuple(BadLine(number, "header", problem) for problem in problems))

    lines: list[Line] = []
    bad: list[BadLine] = []
    seen: dict[str, int] = {}
    for row in rows:
        if isinstance(row, BadLine):
            bad.append(row)
            continue
        number, cells = row
        if len(cells) != len(columns):
            bad.append(BadLine(number, "", f"has {len(cells)} fields, the header has {len(columns)}"))
            continue
        fields = {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}
        sku, problems_here = fields.pop("sku"), []
        if not re.fullmatch(SKU_PATTERN, sku):
            problems_here.append(BadLine(number, "sku", "must be 1 to 64 characters of A-Z a-z 0-9 . _ -"))
        elif sku in seen:
            problems_here.append(BadLine(number, "sku", f"{sku} is on line {seen[sku]} already"))
        else:
            seen[sku] = number
        judged = _judge(number, fields)
        if isinstance(judged, ItemTerms):
            lines.append(Line(number, sku, judged))
        else:
            problems_here += judged
        bad += problems_here
    return Catalogue(tuple(lines), tuple(bad))


async def import_catalogue(lines: Sequence[Line], settings: Settings) -> Imported:
    """Save these items in one transaction, or none of them when a stock is below what is held or sold.

    After the commit, lanes whose waitlists may have been given stock are called, and door records written; both
    heal by themselves when Redis is away. Raises SettingsError for a database that is not laid out for the settings.
    """
    engine = make_async_engine(settings)
    try:
        async with engine.connect() as connection:
            await connection.execute(LIMITS, limits(settings))
            await connection.run_sync(check_lanes, settings.lanes)
            saved, bad = await _save_all(connection, lines, settings)
            if bad:
                await connection.rollback()
                return Imported(0, 0, tuple(bad))
            await connection.commit()
    finally:
        await engine.dispose()
    _tell(saved, settings)
    created = sum(one.created for one in saved)
    return Imported(created, len(saved) - created, ())


async def _save_all(
    connection: AsyncConnection, lines: Sequence[Line], settings: Settings
) -> tuple[list[Saved], list[BadLine]]:
    saved: list[Saved] = []
    bad: list[BadLine] = []
    # By sku, as everybody who locks several items does: two imports at once take turns.
    for line in sorted(lines, key=lambda line: line.sku):
        try:
            saved.append(await items.save(connection, line.sku, line.terms, settings))
        except StockBelowCommittedError as error:
            bad.append(BadLine(line.number, "stock", str(error)))
            if error.__cause__ is not None:  # The database refused: this transaction can say no more.
                break
    return saved, sorted(bad, key=lambda one: one.number)


def _tell(saved: Sequence[Saved], settings: Settings) -> None:
    client = make_redis(settings)
    try:
        with client.pipeline(transaction=False) as pipe:
            doors.queue_write(pipe, [one.door for one in saved], settings)
            pipe.execute()
        lanes = sorted({one.lane for one in saved if not one.created})
        with make_celery(settings) as celery:
            Caller(settings, celery, client).call([lane_call(lane) for lane in lanes])
    except RedisError:
        # Door records are short-lived and the sweep calls the lanes: nothing is lost but a moment.
        pass
    finally:
        client.close()


def _rows(text: str) -> Iterator[tuple[int, list[str]] | BadLine]:
    """Each row that is not empty, with the number of the line it begins on. Ends at what is no CSV."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadLine(number, "", f"is not CSV: {error}")
            return
        if any(cell.strip() for cell in row):
            yield number, row


def _header_problems(columns: Sequence[str]) -> list[str]:
    problems = [f"lacks the column {name}" for name in REQUIRED if name not in columns]
    for name in dict.fromkeys(columns):
        if name not in REQUIRED + OPTIONAL:
            problems.append(f"has the unknown column {name!r}")
        elif columns.count(name) > 1:
            problems.append(f"has the column {name} {columns.count(name)} times")
    return problems


def _judge(number: int, fields: dict[str, str]) -> ItemTerms | list[BadLine]:
    values: dict[str, Any] = {}
    bad: list[BadLine] = []
    for name, cell in fields.items():
        if cell == "":
            if name in REQUIRED:
                bad.append(BadLine(number, name, "is missing"))
            continue
        value = _value(name, cell)
        if isinstance(value, BadValue):
            bad.append(BadLine(number, name, value.problem))
        else:
            values[name] = value
    known_bad = {one.field for one in bad}
    try:
        terms = ItemTerms.model_validate(values)
    except ValidationError as error:
        for one in error.errors(include_url=False, include_input=False):
            field = str(one["loc"][0]) if one["loc"] else ""
            if field not in known_bad:
                bad.append(BadLine(number, field, one["msg"].removeprefix("Value error, ")))
    else:
        if not bad:
            return terms
    order = {name: place for place, name in enumerate(REQUIRED + OPTIONAL)}
    return sorted(bad, key=lambda one: order.get(one.field, len(order)))


@dataclass(frozen=True, slots=True)
class BadValue:
    """A cell that cannot be read as its column's type."""

    problem: str


def _value(name: str, cell: str) -> object:
    if name in _WHOLE_NUMBERS:
        if not re.fullmatch(r"[+-]?[0-9]+", cell):
            return BadValue("is not a whole number")
        return int(cell) if len(cell) <= _MAX_DIGITS else BadValue("is too large")
    if name == "waitlist":
        return _TRUTH.get(cell.lower(), BadValue("is neither true nor false"))
    if name in ("opens_at", "closes_at") and not re.match(r"\d{4}-\d\d-\d\d", cell):
        # Pydantic would read a bare number as seconds since 1970.
        return BadValue("is not a time like 2026-11-27T09:00:00Z")
    return cell


def _unreadable(number: int, problem: str) -> Catalogue:
    return Catalogue((), (BadLine(number, "", problem),))
