"""The stage that the worker's tests play on."""

from pathlib import Path

import pytest

from server.db.database import PostgresDatabase
from tests.jobs.stage import Stage


@pytest.fixture
def stage(database: PostgresDatabase, database_url: str, tmp_path: Path) -> Stage:
    """An empty database and an empty storage."""
    return Stage(database, database_url, tmp_path)
