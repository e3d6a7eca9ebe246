"""A line of purchases in Postgres, put there by the statement that accepts them, with nobody called."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, text

from producers.accept import Order
from shared.database import make_engine
from shared.routing import lane_of
from shared.settings import Settings
from shared.statements.accept import INSERT


@dataclass(frozen=True)
class Line:
    """The items and purchases of one database."""

    engine: Engine
    lanes: int

    @classmethod
    @contextmanager
    def open(cls, environment: Mapping[str, str]) -> Iterator[Line]:
        """A line in the database that these settings name."""
        settings = Settings(
            database_url=environment["FAIRLANE_DATABASE_URL"], redis_url=environment["FAIRLANE_REDIS_URL"]
        )
        engine = make_engine(settings)
        try:
            yield cls(engine, settings.lanes)
        finally:
            engine.dispose()

    def add_item(self, sku: str, stock: int, *, waitlist: bool = True) -> int:
        """A new item; returns its lane."""
        lane = lane_of(sku, self.lanes)
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO fairlane.items"
                    " (sku, lane, name, price, currency, stock, available, hold_seconds, waitlist)"
                    " VALUES (:sku, :lane, :sku, 100, 'EUR', :stock, :stock, 900, :waitlist)"
                ),
                {"sku": sku, "lane": lane, "stock": stock, "waitlist": waitlist},
            )
        return lane

    def accept(self, sku: str, count: int) -> None:
        """So many purchases of one unit each, accepted in one commit."""
        orders = [Order("shop", uuid.uuid4().hex, sku, 1, uuid.uuid4().hex, "tok_visa") for _ in range(count)]
        with self.engine.begin() as connection:
            connection.execute(INSERT, {"orders": json.dumps([order.row() for order in orders])})

    def purchases(self, sku: str) -> list[dict[str, Any]]:
        """All purchases of an item, in order."""
        return self.rows("SELECT status, rev, seq FROM fairlane.purchases WHERE item = :sku ORDER BY seq", sku=sku)

    def statuses(self, sku: str) -> list[str]:
        """Where they stand, in order."""
        return [row["status"] for row in self.purchases(sku)]

    def rows(self, statement: str, **values: object) -> list[dict[str, Any]]:
        """What Postgres answers, committed and fresh."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(statement), values).mappings()]
