"""Migrations make the tables that queries name, whoever runs them and however often; an unsuitable server is refused."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb
from sqlalchemy import create_engine

import server.db.document_tables
import server.db.tables  # noqa: F401 -- both fill the metadata
from server.db.address import parse_database_url
from server.db.columns import metadata
from server.db.database import PostgresDatabase
from server.db.migrate import DatabaseUnsuitable, migrate
from server.db.terms import make_term_row
from server.domain.documents import NewDocument
from server.domain.ids import DOCUMENT, MODEL, new_id
from server.domain.rag_indexes import IndexState
from server.domain.retrieval import Chunking, RetrievalSettings, Search, SearchMode
from server.services.lexical.analysis import analyse_passage, analyse_query

# Everything that a table consists of, as PostgreSQL itself writes it.
_COLUMNS = """
SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull, attcollation::regcollation::text,
    row_number() OVER (PARTITION BY attrelid ORDER BY attnum)
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


MODEL_ID, EMPTY_MODEL_ID, TUNED_MODEL_ID = new_id(MODEL), new_id(MODEL), new_id(MODEL)
DOCUMENT_IDS = sorted([new_id(DOCUMENT), new_id(DOCUMENT)])
PENDING_ID = new_id(DOCUMENT)
PASSAGES = ["The lighthouse keeper climbs two hundred steps.", "تقع مدينة طرابلس على ساحل البحر المتوسط.", "The lighthouse was rebuilt."]


def _fill_second(url: str) -> None:
    """Rows as the second migration's tables hold them: a model with two documents, one without, and a fine-tuned one."""
    rag = Jsonb({"generator_model_id": "b", "embedding_model": "e", "retrieval": {}, "chunking": {"max_tokens": 64, "overlap_tokens": 8},
                 "prompt_template": "", "embedding_dimension": None})  # fmt: skip
    with psycopg.connect(url, autocommit=True) as connection:
        for model_id, of_rag, state, dimension in (
            (MODEL_ID, rag, "READY", 2), (EMPTY_MODEL_ID, rag, "CREATING", None), (TUNED_MODEL_ID, None, "READY", None)
        ):  # fmt: skip
            connection.execute(
                "INSERT INTO models VALUES ('default', %s, %s, 'm', '', '{}', %s, 'b', '', NULL, %s, NULL, %s, NULL, now(), now())",
                (model_id, "RAG" if of_rag else "FINE_TUNED", state, of_rag, dimension),
            )
        connection.execute(
            "INSERT INTO documents VALUES ('default', %s, %s, 't', 's', 'waits', '{}', 'PENDING', 5, 5, 'h', 0, '', now())",
            (MODEL_ID, PENDING_ID),
        )
        for place, text in enumerate(PASSAGES):
            key = ("default", MODEL_ID, DOCUMENT_IDS[place // 2], place % 2)
            if place % 2 == 0:
                connection.execute(
                    "INSERT INTO documents VALUES (%s, %s, %s, 't', '', 'x', '{}', 'INDEXED', 1, 1, 'h', 1, '', now())", key[:3]
                )
            connection.execute("INSERT INTO chunks VALUES (%s, %s, %s, %s, 'chk', %s, 0, 9, 3)", (*key, text))
            connection.execute("INSERT INTO chunk_vectors VALUES (%s, %s, %s, %s, %s)", (*key, f"[{place - 1},1]"))


def _read_pairs(weights: str) -> set[str]:
    return set(weights[1 : weights.index("}")].split(","))


async def test_what_was_stored_before_there_were_terms_and_indexes_is_found(empty_database_url: str) -> None:
    migrate(empty_database_url, "0002")
    _fill_second(empty_database_url)
    migrate(empty_database_url)
    with psycopg.connect(empty_database_url) as connection:
        rows = connection.execute("SELECT words, weights::text, index_number FROM chunk_terms ORDER BY document_id, position").fetchall()
        counts: dict[int, int] = dict(connection.execute("SELECT term, chunk_count FROM term_counts").fetchall())
    expected = [make_term_row("default", MODEL_ID, text) for text in PASSAGES]
    assert [(words, _read_pairs(weights), number) for words, weights, number in rows] == [
        (row["words"], _read_pairs(row["weights"]), 1) for row in expected
    ]
    assert counts == Counter([0] * 3 + [number for text in PASSAGES for number in analyse_passage(text).weights])
    database = PostgresDatabase(empty_database_url)
    try:
        async with database.transaction("default") as transaction:
            model = await transaction.models.get(MODEL_ID)
            settings = RetrievalSettings(similarity_threshold=-1, search_mode=SearchMode.HYBRID)
            search = Search(settings, [-1.0, 1.0], analyse_query("lighthouse keeper"))
            found = await transaction.documents.search(MODEL_ID, search)
            (waiting,) = await transaction.staged.list_known(MODEL_ID, [NewDocument(source_uri="s")])
            indexed = await transaction.documents.get(MODEL_ID, DOCUMENT_IDS[0])
            empty, tuned = await transaction.models.get(EMPTY_MODEL_ID), await transaction.models.get(TUNED_MODEL_ID)
            await transaction.models.delete(MODEL_ID)
    finally:
        await database.close()
    assert [hit.chunk.text for hit in found] == [PASSAGES[0], PASSAGES[2], PASSAGES[1]]
    assert (waiting.document_id, waiting.is_waiting) == (PENDING_ID, True)
    assert (indexed.update_pending, indexed.original_sha256) == (False, indexed.content_sha256)
    assert model.rag is not None
    assert model.rag.index is not None
    assert empty.rag is not None
    assert empty.rag.index is not None
    assert tuned.rag is None
    index = model.rag.index
    assert (index.index_number, index.embedding_model, index.chunking, index.dimension) == (1, "e", Chunking(64, 8), 2)
    assert (index.state, empty.rag.index.state) == (IndexState.READY, IndexState.BUILDING)
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("SELECT count(*) FROM term_counts").fetchall() == [(0,)]


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
