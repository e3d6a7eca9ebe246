"""Alembic's migrations: the one place where the schema is written down."""
