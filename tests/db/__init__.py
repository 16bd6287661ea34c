"""Tests of server/db, all on a real PostgreSQL."""
