"""Three indexes serve the one question that each is for, and no other."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# A CASE is proof to the planner only where the question has the very same; `CASE status WHEN …` is another, which is
# what the guards of updates have. By plain states, whoever asks for the queued of one lane may be led through those of
# all, and whoever claims what is due through all that is held: a plan that was made when nobody waited is none worse
# by that, and is kept in the rush.
_INDEXES = {
    "waiting (item, quantity)": "CASE WHEN status IN ('queued', 'waitlisted') THEN true ELSE false END",
    "held (item, client_id, customer) INCLUDE (quantity)": (
        "CASE WHEN status IN ('reserved', 'charging', 'in_doubt', 'needs_review', 'confirmed') THEN true ELSE false END"
    ),
    "expiring (expires_at)": "CASE WHEN status = 'reserved' THEN true ELSE false END",
}
_BEFORE = {
    "waiting (item, quantity)": "status IN ('queued', 'waitlisted')",
    "held (item, client_id, customer) INCLUDE (quantity)": (
        "status IN ('reserved', 'charging', 'in_doubt', 'needs_review', 'confirmed')"
    ),
    "expiring (expires_at)": "status = 'reserved'",
}


def upgrade() -> None:
    _make(_INDEXES)


def downgrade() -> None:
    _make(_BEFORE)


def _make(indexes: dict[str, str]) -> None:
    op.execute("DROP INDEX fairlane.purchases_waiting, fairlane.purchases_held, fairlane.purchases_expiring")
    for what, which in indexes.items():
        name, _, columns = what.partition(" ")
        op.execute(f"CREATE INDEX purchases_{name} ON fairlane.purchases {columns} WHERE {which}")
