"""Brings a database to today's tables. Safe to run again, and by two processes at once."""

import re
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from server.db.address import parse_database_url

MIN_POSTGRES = 150_000  # 15: foreign keys that set a single column to NULL
MIN_PGVECTOR = (0, 8, 4)  # earlier ones lose rows in HNSW indexes
MIGRATION_LOCK = 0x6D74_6D69  # "mtmi"
CONNECT_TIMEOUT_SECONDS = 10


class DatabaseUnsuitable(Exception):
    """This database cannot be used; the message says why and what to do."""


def migrate(database_url: str, revision: str = "head") -> None:
    """Make or update all tables, in one transaction, up to a revision. Raises DatabaseUnsuitable, ValueError for a URL that is none."""
    engine = create_engine(parse_database_url(database_url), poolclass=NullPool, connect_args={"connect_timeout": CONNECT_TIMEOUT_SECONDS})
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            _check_server(connection)
            _provide_pgvector(connection)
            command.upgrade(_configure(connection), revision)
    except OperationalError as error:
        raise DatabaseUnsuitable(f"PostgreSQL cannot be reached or stopped answering: {_first_line(error)}") from error
    finally:
        engine.dispose()


def _configure(connection: Connection) -> Config:
    config = Config()
    # Alembic reads % as interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _check_server(connection: Connection) -> None:
    version = connection.execute(text("SHOW server_version_num")).scalar_one()
    if int(version) < MIN_POSTGRES:
        raise DatabaseUnsuitable(f"PostgreSQL {MIN_POSTGRES // 10_000} or later is needed; this server is {int(version) // 10_000}.")


def _provide_pgvector(connection: Connection) -> None:
    needed = ".".join(map(str, MIN_PGVECTOR))
    query = text("SELECT default_version, installed_version FROM pg_available_extensions WHERE name = 'vector'")
    row = connection.execute(query).one_or_none()
    if row is None:
        raise DatabaseUnsuitable(f"PostgreSQL has no pgvector: install pgvector {needed} or later on the server.")
    if row.installed_version is not None and _parse_version(row.installed_version) >= MIN_PGVECTOR:
        return
    if _parse_version(row.default_version) < MIN_PGVECTOR:
        raise DatabaseUnsuitable(f"pgvector {needed} or later is needed; this server has {row.default_version}.")
    try:
        # Neither statement fails where the other process of a race was first: both hold the lock.
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
        connection.execute(text("ALTER EXTENSION vector UPDATE"))
    except DBAPIError as error:
        advice = "let a superuser run CREATE EXTENSION vector, or ALTER EXTENSION vector UPDATE, in this database"
        raise DatabaseUnsuitable(f"pgvector could not be set up: {_first_line(error)}; {advice}.") from error


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0].rstrip(".")
