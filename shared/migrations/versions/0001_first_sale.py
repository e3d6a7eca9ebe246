"""Items, lanes, purchases and the attempts to charge for them."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Item names compare by bytes (COLLATE "C"), so that Python's sorted() and Postgres agree on the one lock order.
STATEMENTS = (
    # First come, first served: the place in the line. One value at a time (no CACHE): a purchase acknowledged before
    # another was sent has the lower number, whichever API process took it.
    "CREATE SEQUENCE fairlane.purchase_seq",
    # Fences come from Postgres and not from Redis, where a counter would start again with its data.
    "CREATE SEQUENCE fairlane.fence_seq",
    """
    CREATE TABLE fairlane.lanes (
        lane            smallint PRIMARY KEY,
        -- Every purchase of the lane up to this seq was decided, except those that were then still being committed.
        decided_through bigint NOT NULL DEFAULT 0
    ) WITH (fillfactor = 50)
    """,
    """
    CREATE TABLE fairlane.items (
        sku          text COLLATE "C" PRIMARY KEY CHECK (sku ~ '^[A-Za-z0-9._-]{1,64}$'),
        lane         smallint NOT NULL REFERENCES fairlane.lanes,
        name         text NOT NULL,
        price        bigint NOT NULL CHECK (price >= 0),
        currency     text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
        stock        integer NOT NULL,
        available    integer NOT NULL,
        -- Held for purchases that are not paid yet. What is sold follows: stock - available - unpaid.
        unpaid       integer NOT NULL DEFAULT 0,
        per_customer integer CHECK (per_customer > 0),
        opens_at     timestamptz,
        closes_at    timestamptz CHECK (closes_at > opens_at),
        hold_seconds integer NOT NULL CHECK (hold_seconds > 0),
        waitlist     boolean NOT NULL DEFAULT true,
        rev          bigint NOT NULL DEFAULT 1,
        created_at   timestamptz NOT NULL DEFAULT now(),
        updated_at   timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT never_oversold CHECK (available >= 0 AND unpaid >= 0 AND available + unpaid <= stock)
    ) WITH (fillfactor = 50)
    """,
    """
    CREATE TABLE fairlane.purchases (
        id              uuid PRIMARY KEY,
        seq             bigint NOT NULL UNIQUE,
        client_id       text COLLATE "C" NOT NULL,
        idempotency_key text COLLATE "C" NOT NULL,
        -- What the first request with this key asked for: SHA-256 of its canonical body.
        fingerprint     bytea NOT NULL,
        item            text COLLATE "C" NOT NULL REFERENCES fairlane.items,
        lane            smallint NOT NULL,
        quantity        integer NOT NULL CHECK (quantity BETWEEN 1 AND 1000),
        customer        text COLLATE "C" NOT NULL,
        payment_token   text,
        amount          bigint NOT NULL CHECK (amount >= 0),
        currency        text NOT NULL,
        status          text NOT NULL DEFAULT 'queued',
        reason          text,
        rev             bigint NOT NULL DEFAULT 1,
        attempt         integer NOT NULL DEFAULT 0,
        fence           bigint,
        charge_id       text,
        due_at          timestamptz,
        call_deadline   timestamptz,
        expires_at      timestamptz,
        accepted_at     timestamptz NOT NULL DEFAULT now(),
        decided_at      timestamptz,
        finished_at     timestamptz,
        CONSTRAINT one_key_one_purchase UNIQUE (client_id, idempotency_key),
        CONSTRAINT known_status CHECK (status IN (
            'queued', 'waitlisted', 'reserved', 'charging', 'in_doubt', 'needs_review',
            'confirmed', 'declined', 'sold_out', 'limit_reached', 'cancelled', 'expired')),
        CONSTRAINT finished_when_final CHECK ((finished_at IS NOT NULL) = (status IN
            ('confirmed', 'declined', 'sold_out', 'limit_reached', 'cancelled', 'expired'))),
        CONSTRAINT token_erased_when_final CHECK ((payment_token IS NULL) = (status IN
            ('confirmed', 'declined', 'sold_out', 'limit_reached', 'cancelled', 'expired'))),
        CONSTRAINT undecided_while_waiting CHECK (status NOT IN ('queued', 'waitlisted') OR decided_at IS NULL),
        CONSTRAINT decided_when_settled CHECK (decided_at IS NOT NULL OR status IN
            ('queued', 'waitlisted', 'needs_review', 'cancelled', 'expired')),
        CONSTRAINT due_when_reserved CHECK (status <> 'reserved' OR (due_at IS NOT NULL AND expires_at IS NOT NULL)),
        CONSTRAINT claimed_with_a_fence CHECK (status NOT IN ('charging', 'in_doubt', 'confirmed', 'declined')
            OR (fence IS NOT NULL AND attempt > 0)),
        CONSTRAINT called_with_a_deadline CHECK (status NOT IN ('charging', 'in_doubt') OR call_deadline IS NOT NULL),
        CONSTRAINT charged_when_confirmed CHECK (status <> 'confirmed' OR charge_id IS NOT NULL),
        CONSTRAINT charge_only_when_paid_for CHECK (charge_id IS NULL OR status IN ('confirmed', 'declined'))
    ) WITH (fillfactor = 80)
    """,
    # Each index serves one question; all are partial, so they stay as small as what is open.
    "CREATE INDEX purchases_queued ON fairlane.purchases (lane, seq) WHERE status = 'queued'",
    "CREATE INDEX purchases_waitlisted ON fairlane.purchases (lane, item, seq) WHERE status = 'waitlisted'",
    "CREATE INDEX purchases_due ON fairlane.purchases (due_at, seq) WHERE status = 'reserved'",
    """
    CREATE INDEX purchases_held ON fairlane.purchases (item, client_id, customer) INCLUDE (quantity)
    WHERE status IN ('reserved', 'charging', 'in_doubt', 'needs_review', 'confirmed')
    """,
    """
    CREATE TABLE fairlane.charge_attempts (
        purchase_id   uuid NOT NULL REFERENCES fairlane.purchases,
        attempt       integer NOT NULL CHECK (attempt > 0),
        fence         bigint NOT NULL UNIQUE,
        worker        text NOT NULL,
        claimed_at    timestamptz NOT NULL,
        call_deadline timestamptz NOT NULL,
        outcome       text CHECK (outcome IN ('confirmed', 'declined', 'not_sent', 'in_doubt')),
        reason        text,
        charge_id     text,
        recorded_at   timestamptz,
        PRIMARY KEY (purchase_id, attempt),
        CONSTRAINT recorded_with_its_time CHECK ((outcome IS NULL) = (recorded_at IS NULL))
    )
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute(
        "DROP TABLE fairlane.charge_attempts, fairlane.purchases, fairlane.items, fairlane.lanes;"
        "DROP SEQUENCE fairlane.purchase_seq, fairlane.fence_seq"
    )
