"""An operator may decline what was set aside before its decision: it never had a claim, and so has no fence."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _replace("('charging', 'in_doubt', 'confirmed')")
    op.execute("CREATE INDEX purchases_in_review ON fairlane.purchases (seq) WHERE status = 'needs_review'")


def downgrade() -> None:
    op.execute("DROP INDEX fairlane.purchases_in_review")
    _replace("('charging', 'in_doubt', 'confirmed', 'declined')")


def _replace(claimed: str) -> None:
    op.execute(
        "ALTER TABLE fairlane.purchases DROP CONSTRAINT claimed_with_a_fence, ADD CONSTRAINT claimed_with_a_fence CHECK"
        f" (status NOT IN {claimed} OR (fence IS NOT NULL AND attempt > 0)) NOT VALID"
    )
    op.execute("ALTER TABLE fairlane.purchases VALIDATE CONSTRAINT claimed_with_a_fence")
