"""What recovery needs to know: when a doubt began, when to ask the provider, and what to ask again later."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    ALTER TABLE fairlane.purchases
        ADD COLUMN doubt_since timestamptz,
        -- When the provider is asked next what became of the call.
        ADD COLUMN ask_at timestamptz,
        ADD CONSTRAINT asked_while_in_doubt CHECK
            (status <> 'in_doubt' OR (doubt_since IS NOT NULL AND ask_at IS NOT NULL)) NOT VALID
    """,
    # Purchases of the first version may be in doubt already: ask at once.
    """
    UPDATE fairlane.purchases SET doubt_since = clock_timestamp(), ask_at = clock_timestamp()
    WHERE status = 'in_doubt'
    """,
    "ALTER TABLE fairlane.purchases VALIDATE CONSTRAINT asked_while_in_doubt",
    "CREATE INDEX purchases_overdue ON fairlane.purchases (call_deadline) WHERE status = 'charging'",
    "CREATE INDEX purchases_in_doubt ON fairlane.purchases (ask_at) WHERE status = 'in_doubt'",
    "CREATE INDEX purchases_expiring ON fairlane.purchases (expires_at) WHERE status = 'reserved'",
    """
    ALTER TABLE fairlane.charge_attempts
        DROP CONSTRAINT charge_attempts_outcome_check,
        ADD CONSTRAINT known_outcome CHECK
            (outcome IN ('confirmed', 'declined', 'not_sent', 'in_doubt', 'not_charged', 'needs_review')),
        -- A provider that said "never charged" is asked again later, in case it was wrong.
        ADD COLUMN recheck_at timestamptz,
        ADD COLUMN rechecks integer NOT NULL DEFAULT 0
    """,
    "CREATE INDEX charge_attempts_recheck ON fairlane.charge_attempts (recheck_at) WHERE recheck_at IS NOT NULL",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute(
        "DROP INDEX fairlane.purchases_overdue, fairlane.purchases_in_doubt, fairlane.purchases_expiring;"
        "ALTER TABLE fairlane.purchases DROP COLUMN doubt_since, DROP COLUMN ask_at;"
        "ALTER TABLE fairlane.charge_attempts DROP COLUMN recheck_at, DROP COLUMN rechecks"
    )
