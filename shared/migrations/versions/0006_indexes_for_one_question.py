"""Two indexes serve the one question that each is for, and no other."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# A CASE is proof to the planner only where the question has the same. By plain states, whoever asks for the queued or
# the reserved of one lane may be led through those of all items: a plan that was made when nobody waited is none the
# worse by that, and is kept in the rush.
_WAITING = "status IN ('queued', 'waitlisted')"
_HELD = "status IN ('reserved', 'charging', 'in_doubt', 'needs_review', 'confirmed')"


def upgrade() -> None:
    _make(waiting=f"CASE WHEN {_WAITING} THEN true ELSE false END", held=f"CASE WHEN {_HELD} THEN true ELSE false END")


def downgrade() -> None:
    _make(waiting=_WAITING, held=_HELD)


def _make(*, waiting: str, held: str) -> None:
    op.execute("DROP INDEX fairlane.purchases_waiting, fairlane.purchases_held")
    op.execute(f"CREATE INDEX purchases_waiting ON fairlane.purchases (item, quantity) WHERE {waiting}")
    op.execute(
        f"CREATE INDEX purchases_held ON fairlane.purchases (item, client_id, customer) INCLUDE (quantity) WHERE {held}"
    )
