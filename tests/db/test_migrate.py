"""Migrations make the tables that queries name, whoever runs them and however often; an unsuitable server is refused."""

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg.rows import TupleRow
from sqlalchemy import create_engine

import server.db.document_tables
import server.db.tables  # noqa: F401 -- both fill the metadata
from server.db.address import parse_database_url
from server.db.columns import metadata
from server.db.migrate import DatabaseUnsuitable, migrate

# Everything that a table consists of, as PostgreSQL itself writes it.
_COLUMNS = """
SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull, attcollation::regcollation::text, attnum
FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped AND relname <> 'alembic_version'"""
_CONSTRAINTS = """
SELECT conrelid::regclass::text, contype::text, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'"""
_INDEXES = "SELECT tablename::text, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"


def _describe(url: str) -> set[TupleRow]:
    with psycopg.connect(url) as connection:
        return {row for query in (_COLUMNS, _CONSTRAINTS, _INDEXES) for row in connection.execute(query)}


def test_migrations_make_the_tables_that_queries_name(database_url: str, empty_database_url: str) -> None:
    engine = create_engine(parse_database_url(empty_database_url))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE EXTENSION vector")
        metadata.create_all(connection)
    engine.dispose()
    assert _describe(database_url) == _describe(empty_database_url)


def test_every_key_begins_with_the_organization(sql: psycopg.Connection[TupleRow]) -> None:
    keys = sql.execute(
        """SELECT indrelid::regclass::text, attname FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
        WHERE indisunique AND indrelid::regclass::text <> ALL ('{alembic_version}')
            AND indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)
        UNION ALL SELECT conrelid::regclass::text, attname FROM pg_constraint
        JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1] WHERE contype = 'f'"""
    ).fetchall()
    assert {table for table, _ in keys} == set(metadata.tables)
    assert {column for _, column in keys} == {"organization"}


def test_migrating_again_changes_nothing(database_url: str, sql: psycopg.Connection[TupleRow]) -> None:
    sql.execute("INSERT INTO requests VALUES ('default', 'method', 'id', 'hash', '{}', now())")
    before = _describe(database_url)
    migrate(database_url)
    assert _describe(database_url) == before
    assert sql.execute("SELECT count(*) FROM requests").fetchall() == [(1,)]


def test_several_may_migrate_at_once(empty_database_url: str, database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, [empty_database_url] * 4))
    assert _describe(empty_database_url) == _describe(database_url)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("WHERE false", "has no pgvector"),
        ("", r"pgvector 0\.8\.4 or later is needed; this server has 0\.8\.3"),
    ],
)
def test_a_server_without_a_good_pgvector_is_refused(empty_database_url: str, rows: str, sentence: str) -> None:
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        # Stands before PostgreSQL's own view of the same name on the search path below.
        view = "CREATE VIEW pg_available_extensions AS SELECT 'vector' AS name, '0.8.3' AS default_version, NULL::text AS installed_version"
        connection.execute(f"{view} {rows}")
    with pytest.raises(DatabaseUnsuitable, match=sentence):
        migrate(f"{empty_database_url}&options=-csearch_path%3Dpublic,pg_catalog")
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchall() == [(0,)]


def test_a_server_that_does_not_answer_is_named_without_the_password() -> None:
    with pytest.raises(DatabaseUnsuitable, match="cannot be reached") as caught:
        migrate("postgresql://ann:secret@127.0.0.1:1/training")
    assert "secret" not in str(caught.value)
