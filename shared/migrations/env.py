"""Alembic's environment: runs the migrations on the connection that `shared.migrate` hands over."""

from __future__ import annotations

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, version_table_schema="fairlane", transaction_per_migration=False)
with context.begin_transaction():
    context.run_migrations()
