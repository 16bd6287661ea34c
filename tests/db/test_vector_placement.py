"""Large indexes get tables with an HNSW index of their own, while searches, writes and deletions go on."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg.rows import TupleRow
from psycopg.sql import SQL
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from server.db import vector_placement
from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.db.vector_placement import PostgresVectorTables
from server.domain.documents import NewDocument
from server.domain.ids import DOCUMENT, new_id
from server.domain.models import Model
from server.domain.retrieval import MetadataCondition, PlaceChanged, RetrievalSettings, RetrievedChunk, Search, SearchMode
from server.services.job_queue import Lease
from server.services.lexical.analysis import analyse_query
from tests.db.samples import ORGANIZATION, add_model, make_chunks, make_rag_model, start_job

DIMENSION = 48
CHUNKS_PER_DOCUMENT = 50
CLUSTERS = 60
DENSE = RetrievalSettings(top_k=10, similarity_threshold=-1, search_mode=SearchMode.DENSE)


def make_clustered(count: int, seed: int) -> NDArray[numpy.float16]:
    """Unit vectors around a few directions, the same ones for every seed, as float16 [count, dimension]."""
    directions = numpy.random.default_rng(0).normal(size=(CLUSTERS, DIMENSION))
    random = numpy.random.default_rng(seed)
    numbers = directions[random.integers(CLUSTERS, size=count)] + 0.7 * random.normal(size=(count, DIMENSION))
    vectors: NDArray[numpy.float16] = (numbers / numpy.linalg.norm(numbers, axis=1, keepdims=True)).astype("<f2")
    return vectors


@dataclass
class Library:
    """A model whose documents have 50 chunks each; the metadata of a document tell its number and its share."""

    database: PostgresDatabase
    queue: PostgresJobQueue
    model: Model
    lease: Lease
    documents: list[str]
    vectors: NDArray[numpy.float16]

    async def add(self, count: int, seed: int) -> None:
        """Add and index documents."""
        new = [
            (new_id(DOCUMENT), NewDocument("text", metadata={"number": n, "share": n % 20, "half": n % 2}))
            for n in range(len(self.documents), len(self.documents) + count)
        ]
        async with self.database.transaction(ORGANIZATION) as transaction:
            await transaction.documents.insert(self.model.model_id, new)
        for number, (document_id, _) in enumerate(new):
            await self.commit(document_id, make_clustered(CHUNKS_PER_DOCUMENT, seed + number))

    async def commit(self, document_id: str, vectors: NDArray[numpy.float16]) -> None:
        """Write a document's chunks."""
        chunks = make_chunks([f"word{place}" for place in range(len(vectors))])
        await self.queue.commit_document(self.lease, document_id, chunks, vectors.tobytes(), DIMENSION, "", 1)
        if document_id not in self.documents:
            self.documents.append(document_id)
            self.vectors = numpy.concatenate([self.vectors, vectors])

    async def find(self, vector: NDArray[numpy.float16], settings: RetrievalSettings = DENSE) -> Sequence[RetrievedChunk]:
        """Search."""
        async with self.database.reading(ORGANIZATION) as transaction:
            search = Search(settings, vector.astype(float).tolist(), analyse_query("word7"))
            return await transaction.documents.search(self.model.model_id, search)

    def nearest(self, vector: NDArray[numpy.float16], most: int, documents: Sequence[int] | None = None) -> set[tuple[str, int]]:
        """The chunks that are nearest in truth, of the given documents."""
        stored = self.vectors.astype(numpy.float64)
        similar = stored @ vector.astype(numpy.float64) / numpy.linalg.norm(stored, axis=1)
        order = [int(row) for row in numpy.argsort(-similar) if documents is None or row // CHUNKS_PER_DOCUMENT in documents]
        return {(self.documents[row // CHUNKS_PER_DOCUMENT], row % CHUNKS_PER_DOCUMENT) for row in order[:most]}

    async def measure_recall(self, settings: RetrievalSettings, documents: Sequence[int] | None = None) -> float:
        """How many of the nearest ten are found, over 50 queries."""
        found = 0
        for query in make_clustered(50, seed=999):
            hits = {(hit.document_id, hit.chunk.position) for hit in await self.find(query, settings)}
            found += len(hits & self.nearest(query, 10, documents))
        return found / 500


@pytest.fixture
async def library(database: PostgresDatabase, queue: PostgresJobQueue) -> Library:
    """A thousand chunks."""
    await PostgresVectorTables(database).tend()  # drops what the test before left
    model = await add_model(database, make_rag_model())
    library = Library(database, queue, model, await start_job(database, queue, model), [], numpy.empty((0, DIMENSION), numpy.float16))
    await library.add(20, seed=1)
    return library


@pytest.fixture
def tables(database: PostgresDatabase) -> PostgresVectorTables:
    """Takes five hundred chunks for many."""
    return PostgresVectorTables(database, indexed_from_chunks=500)


def list_tables(sql: psycopg.Connection[TupleRow]) -> list[str]:
    rows = sql.execute("SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE 'chunk\\_vectors\\_%' ORDER BY 1").fetchall()
    return [name for (name,) in rows]


def count(sql: psycopg.Connection[TupleRow], table: str) -> int:
    row = sql.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608  # a table of ours
    return row[0] if row else 0


async def test_a_large_index_moves_to_a_table_with_an_hnsw_index(
    library: Library, tables: PostgresVectorTables, sql: psycopg.Connection[TupleRow]
) -> None:
    query = library.vectors[7]
    before = await library.find(query)
    done = await tables.tend()
    (table,) = list_tables(sql)
    assert [line.split(":")[0] for line in done] == [table, table]
    assert (count(sql, "chunk_vectors"), count(sql, table)) == (0, 1_000)
    assert await library.find(query) == before
    assert await tables.tend() == []


async def test_a_small_index_stays_where_it_is(library: Library, database: PostgresDatabase, sql: psycopg.Connection[TupleRow]) -> None:
    assert await PostgresVectorTables(database, indexed_from_chunks=1_001).tend() == []
    assert list_tables(sql) == []


async def test_the_indexed_search_finds_99_of_100_of_the_nearest(library: Library, tables: PostgresVectorTables) -> None:
    await tables.tend()
    assert await library.measure_recall(DENSE) >= 0.99


@pytest.mark.parametrize("scanned_chunks", [20_000, 10], ids=["few documents", "many documents"])
async def test_a_filter_loses_none_of_the_nearest(
    library: Library, tables: PostgresVectorTables, monkeypatch: pytest.MonkeyPatch, scanned_chunks: int
) -> None:
    await tables.tend()
    monkeypatch.setattr(
        "server.db.search.build_search.__kwdefaults__", {"compared_chunks": 5_000, "scanned_chunks": scanned_chunks}, raising=True
    )
    where = replace(DENSE, filter=(MetadataCondition("share", equals=3),))
    assert await library.measure_recall(where, [3]) >= (1.0 if scanned_chunks > 100 else 0.99)


MORE_VECTORS = """
INSERT INTO chunk_vectors (organization, model_id, document_id, index_number, position, embedding)
SELECT organization, model_id, document_id, 1, place,
    (SELECT array_agg(random() - 0.5) FROM generate_series(1, 48 + 0 * place))::halfvec
FROM documents, generate_series(100, 1099) AS place
"""


async def test_the_planner_uses_the_hnsw_index(
    library: Library, database: PostgresDatabase, sql: psycopg.Connection[TupleRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_placement, "BUILD_CANDIDATES", 8)  # a poor graph, built in a second
    monkeypatch.setattr(vector_placement, "LINKS", 4)
    sql.execute(MORE_VECTORS)
    sql.execute("UPDATE term_counts SET chunk_count = 21000 WHERE term = 0")
    await PostgresVectorTables(database).tend()
    (table,) = list_tables(sql)
    for where in ((), (MetadataCondition("half", equals=1),)):
        for mode in (SearchMode.DENSE, SearchMode.HYBRID):
            plan = await explain(library, replace(DENSE, filter=where, search_mode=mode))
            # Once, also where a filter may keep many; what few keep is found by key.
            assert plan.count(f"Index Scan using {table}_hnsw on {table}") == 1
            assert f"Seq Scan on {table}" not in plan
            assert f"{table}_pkey" in plan or not where


async def explain(library: Library, settings: RetrievalSettings) -> str:
    """The plan of a search, as the pool's connections make it."""
    plans: list[str] = []

    def explain(connection: Connection, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        if statement.startswith("WITH"):
            plans.extend(row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters))  # type: ignore[arg-type]  # as they come

    event.listen(Engine, "before_cursor_execute", explain)
    try:
        await library.find(library.vectors[0], settings)
    finally:
        event.remove(Engine, "before_cursor_execute", explain)
    return "\n".join(plans)


async def test_what_is_written_and_deleted_afterwards_is_in_the_new_table(
    library: Library, tables: PostgresVectorTables, sql: psycopg.Connection[TupleRow]
) -> None:
    await tables.tend()
    await library.add(2, seed=500)
    (table,) = list_tables(sql)
    assert (count(sql, "chunk_vectors"), count(sql, table)) == (0, 1_100)
    for query in (library.vectors[1_050], library.vectors[1_001]):
        assert {(hit.document_id, hit.chunk.position) for hit in await library.find(query)} == library.nearest(query, 10)
    await library.commit(library.documents[20], make_clustered(3, seed=77))
    assert count(sql, table) == 1_053
    async with library.database.transaction(ORGANIZATION) as transaction:
        await transaction.documents.delete(library.model.model_id, library.documents[21])
    assert count(sql, table) == 1_003
    assert library.documents[21] not in {hit.document_id for hit in await library.find(library.vectors[1_070])}


async def test_a_search_that_was_sent_to_the_old_table_says_so(library: Library, tables: PostgresVectorTables) -> None:
    async with library.database.reading(ORGANIZATION) as transaction:
        _, rag = await transaction.models.read_rag(library.model.model_id)
    assert rag is not None
    assert rag.index is not None
    search = Search(DENSE, library.vectors[0].astype(float).tolist(), place=rag.index.place)
    async with library.database.reading(ORGANIZATION) as transaction:
        assert len(await transaction.documents.search(library.model.model_id, search)) == 10
        await tables.tend()
        with pytest.raises(PlaceChanged):
            await transaction.documents.search(library.model.model_id, search)


async def test_searches_commits_and_deletions_go_on_while_the_vectors_move(library: Library, tables: PostgresVectorTables) -> None:
    moving = asyncio.create_task(tables.tend())
    gone = library.documents[:5]
    searches = 0
    for document_id in gone:
        async with library.database.transaction(ORGANIZATION) as transaction:
            await transaction.documents.delete(library.model.model_id, document_id)
        await library.add(1, seed=800 + searches)
        try:
            assert len(await library.find(library.vectors[700])) == 10
        except PlaceChanged:
            continue  # the service looks it up again
        searches += 1
    await moving
    assert searches > 3
    found = await library.find(library.vectors[1_020], replace(DENSE, top_k=900))
    assert len(found) == 900
    assert not {hit.document_id for hit in found} & set(gone)
    assert library.documents[20] in {hit.document_id for hit in found[:3]}


async def test_a_table_whose_index_is_gone_is_dropped(
    library: Library, tables: PostgresVectorTables, sql: psycopg.Connection[TupleRow]
) -> None:
    await tables.tend()
    (table,) = list_tables(sql)
    sql.execute("DELETE FROM jobs")
    async with library.database.transaction(ORGANIZATION) as transaction:
        await transaction.models.delete(library.model.model_id)
    assert await tables.tend() == [f"{table}: dropped, its index is gone"]
    assert list_tables(sql) == []


async def test_what_a_dead_worker_left_is_finished_by_the_next(
    library: Library, tables: PostgresVectorTables, sql: psycopg.Connection[TupleRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = vector_placement._BUILD
    monkeypatch.setattr(vector_placement, "_BUILD", SQL("SELECT 1/0 {index}{table}{links}{candidates}"))
    with pytest.raises(psycopg.Error):
        await tables.tend()
    (table,) = list_tables(sql)
    # It answers, and an index that was left half-built is none.
    query = library.vectors[3]
    assert {(hit.document_id, hit.chunk.position) for hit in await library.find(query)} == library.nearest(query, 10)
    sql.execute(f"CREATE INDEX {table}_hnsw ON {table} USING hnsw (embedding halfvec_cosine_ops)")
    sql.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", (f"{table}_hnsw",))
    monkeypatch.setattr(vector_placement, "_BUILD", broken)
    assert [line.split(" vectors")[0] for line in await tables.tend()] == [f"{table}: HNSW index over 1,000"]
    assert await tables.tend() == []


async def test_one_worker_at_a_time_tends(library: Library, tables: PostgresVectorTables, sql: psycopg.Connection[TupleRow]) -> None:
    sql.execute("SELECT pg_advisory_lock(%s)", (vector_placement.TEND_LOCK,))
    assert await tables.tend() == []
    assert list_tables(sql) == []


async def test_connections_scan_hnsw_indexes_as_is_said_here(database: PostgresDatabase) -> None:
    async with database.begin() as connection:
        await connection.exec_driver_sql("SELECT '[1]'::halfvec")  # loads pgvector
        for name, value in (("hnsw.ef_search", "200"), ("hnsw.iterative_scan", "relaxed_order"), ("hnsw.max_scan_tuples", "100000")):
            assert (await connection.exec_driver_sql(f"SHOW {name}")).scalar_one() == value
