"""Alembic's steps from an empty database to today's tables. A step that was released is never changed: write the next one."""
