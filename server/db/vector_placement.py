"""Tables of their own for the vectors of large indexes, each with an HNSW index: made, filled, indexed and dropped.

A small index is compared whole, in the table that all share. One that has grown gets its own in steps, each a transaction or a statement
that is found due by looking at what is there: a worker may die between any two, searches and writes go on, and the next turn goes on.

1. The table, empty. Its foreign key locks `documents` for a moment, and no longer.
2. Under the lock of the index's row, its vectors move, and the row names their table. Whoever writes vectors holds that row
   (`lock_vectors`); whoever searches is told by the row's revision that they moved.
3. CREATE INDEX CONCURRENTLY. Until it is there the table is compared whole; what is written meanwhile comes into the index too.
4. A table whose index is gone is dropped.
"""

import time
from collections.abc import Sequence
from typing import LiteralString

import psycopg
from psycopg.rows import TupleRow
from psycopg.sql import SQL, Identifier, Literal

from server.db.database import PostgresDatabase
from server.db.terms import EVERY_CHUNK
from server.db.vector_tables import name_vector_table

# Comparing so many vectors of 384 numbers takes some 10 ms.
INDEXED_FROM_CHUNKS = 20_000
# Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using HNSW graphs" (2018). pgvector's own 16 and 64 build
# in a quarter of the time, and lost 1 to 8 % of the nearest ten where vectors lie in tight clusters, or in none; these find 99 %.
LINKS = 24
BUILD_CANDIDATES = 128
MAX_INDEXED_DIMENSION = 3_900  # of halfvec, whole on a page beside its keys
# A graph that fits into this memory is built several times as fast. Besides its numbers an element takes its links and some names.
MAX_BUILD_BYTES = 4 << 30
MIN_BUILD_BYTES = 64 << 20
ELEMENT_BYTES = 1_500

_APPLICATION = "model-training-vectors"
TEND_LOCK = 0x6D74_7674  # "mtvt": one worker at a time
LOCK_TIMEOUT_SECONDS = 10
# Steps 2 and 3 take as long as they take; in both a dead client is noticed.
_OPTIONS = f"-c statement_timeout=0 -c lock_timeout={LOCK_TIMEOUT_SECONDS}s -c client_connection_check_interval=5s"

_COLUMNS = SQL("organization, model_id, document_id, index_number, position, embedding")
_CREATE = SQL(
    """
    CREATE TABLE IF NOT EXISTS {table} (
        organization TEXT COLLATE "C" NOT NULL,
        model_id TEXT COLLATE "C" NOT NULL,
        document_id TEXT COLLATE "C" NOT NULL,
        index_number INTEGER NOT NULL,
        position INTEGER NOT NULL,
        embedding halfvec({dimension}) STORAGE PLAIN NOT NULL,
        PRIMARY KEY (organization, model_id, document_id, index_number, position),
        CONSTRAINT {key} FOREIGN KEY (organization, model_id, document_id)
            REFERENCES documents (organization, model_id, document_id) ON DELETE CASCADE
    )
    """
)
# The model's row too, which a deletion locks first: each waits for the other at its beginning, never in the middle.
_LOCK = """
SELECT organization, model_id, index_number FROM rag_indexes JOIN models USING (organization, model_id)
WHERE index_key = %s AND vector_table IS NULL FOR UPDATE OF rag_indexes FOR KEY SHARE OF models
"""
_MOVE = SQL(
    """
    WITH moved AS (
        DELETE FROM chunk_vectors WHERE organization = %s AND model_id = %s AND index_number = %s RETURNING {columns}
    )
    INSERT INTO {table} ({columns}) SELECT {columns} FROM moved
    """
)
_SWITCH = "UPDATE rag_indexes SET vector_table = %s WHERE index_key = %s"
_BUILD = SQL(
    """
    CREATE INDEX CONCURRENTLY {index} ON {table} USING hnsw (embedding halfvec_cosine_ops)
    WITH (m = {links}, ef_construction = {candidates})
    """
)

_GROWN = """
SELECT index_key, dimension FROM rag_indexes JOIN term_counts USING (organization, model_id, index_number)
WHERE vector_table IS NULL AND term = %s AND chunk_count >= %s AND dimension <= %s ORDER BY index_key
"""
_UNINDEXED = """
SELECT index_key, dimension, chunk_count FROM rag_indexes JOIN term_counts USING (organization, model_id, index_number)
WHERE vector_table IS NOT NULL AND term = %s
    AND NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass(vector_table || '_hnsw') AND indisvalid) ORDER BY index_key
"""
_ORPHANED = """
SELECT relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE nspname = current_schema() AND relkind = 'r' AND relname ~ '^chunk_vectors_[0-9]+$'
    AND NOT EXISTS (SELECT FROM rag_indexes WHERE 'chunk_vectors_' || index_key = relname)
"""


class PostgresVectorTables:
    """Gives large indexes their tables. Any number of workers may ask for it; one at a time does it."""

    def __init__(self, database: PostgresDatabase, indexed_from_chunks: int = INDEXED_FROM_CHUNKS) -> None:
        self._connection_string = database.connection_string
        self._indexed_from_chunks = indexed_from_chunks

    async def tend(self) -> Sequence[str]:
        """Do whatever is due; give a line for each thing that was done. Takes minutes where a large index is built."""
        connect = psycopg.AsyncConnection[TupleRow].connect
        async with await connect(self._connection_string, autocommit=True, options=_OPTIONS, application_name=_APPLICATION) as connection:
            ((is_mine,),) = await _fetch(connection, "SELECT pg_try_advisory_lock(%s)", TEND_LOCK)
            if not is_mine:
                return []
            done: list[str] = []
            for key, dimension in await _fetch(connection, _GROWN, EVERY_CHUNK, self._indexed_from_chunks, MAX_INDEXED_DIMENSION):
                done += await _move(connection, key, dimension)
            for key, dimension, chunks in await _fetch(connection, _UNINDEXED, EVERY_CHUNK):
                done += await _build(connection, key, dimension, chunks)
            for (name,) in await _fetch(connection, _ORPHANED):
                await connection.execute(SQL("DROP TABLE {}").format(Identifier(name)))
                done.append(f"{name}: dropped, its index is gone")
            return done


async def _fetch(connection: psycopg.AsyncConnection[TupleRow], query: LiteralString, *values: object) -> list[TupleRow]:
    return await (await connection.execute(query, values)).fetchall()


async def _move(connection: psycopg.AsyncConnection[TupleRow], key: int, dimension: int) -> Sequence[str]:
    """Steps 1 and 2. Nothing is moved where the index has gone, or another worker was first."""
    name = name_vector_table(key)
    table = Identifier(name)
    await connection.execute(_CREATE.format(table=table, dimension=Literal(dimension), key=Identifier(f"{name}_of_document")))
    async with connection.transaction():
        found = await _fetch(connection, _LOCK, key)
        if not found:
            return []
        moved = await connection.execute(_MOVE.format(table=table, columns=_COLUMNS), found[0])
        await connection.execute(_SWITCH, (name, key))
    await connection.execute(SQL("ANALYZE {}").format(table))
    return [f"{name}: {moved.rowcount:,} vectors moved into it"]


async def _build(connection: psycopg.AsyncConnection[TupleRow], key: int, dimension: int, chunks: int) -> Sequence[str]:
    """Step 3. An index that a dead worker left half-built is dropped first."""
    name = name_vector_table(key)
    table, index = Identifier(name), Identifier(f"{name}_hnsw")
    memory = min(max(chunks * (2 * dimension + ELEMENT_BYTES), MIN_BUILD_BYTES), MAX_BUILD_BYTES)
    await connection.execute(SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(index))
    # One process: a second one would need shared memory, of which containers have little, and the cores have other work.
    await connection.execute(SQL("SET max_parallel_maintenance_workers = 0"))
    # It waits for transactions that began before it, of whatever length.
    await connection.execute(SQL("SET lock_timeout = 0"))
    await connection.execute(SQL("SET maintenance_work_mem = {}").format(Literal(f"{memory >> 10}kB")))
    start = time.monotonic()
    await connection.execute(_BUILD.format(index=index, table=table, links=Literal(LINKS), candidates=Literal(BUILD_CANDIDATES)))
    await connection.execute(SQL("SET lock_timeout = {}").format(Literal(f"{LOCK_TIMEOUT_SECONDS}s")))
    await connection.execute(SQL("ANALYZE {}").format(table))
    return [f"{name}: HNSW index over {chunks:,} vectors built in {time.monotonic() - start:.0f} s"]
