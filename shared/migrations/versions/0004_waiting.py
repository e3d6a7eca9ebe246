"""How many units of an item wait is counted anew where Redis has lost it, however many other purchases its lane has."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Equal entries share one: 7 bytes a purchase. Measured: inserts are about 6 % slower with it; without it, counting
    # the units of any item takes 0.3 s when a million purchases are queued in its lane.
    op.execute(
        "CREATE INDEX purchases_waiting ON fairlane.purchases (item, quantity) WHERE status IN ('queued', 'waitlisted')"
    )


def downgrade() -> None:
    op.execute("DROP INDEX fairlane.purchases_waiting")
