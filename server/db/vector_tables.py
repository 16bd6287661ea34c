"""Where the vectors of an index lie: with those of all small ones, or in a table of its own (see vector_placement)."""

from functools import lru_cache

from sqlalchemy import MetaData, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey, chunk_vectors, rag_indexes


def name_vector_table(own_table: int | None) -> str:
    """Name the table that holds an index's vectors: its own, by its key, or the shared one."""
    return chunk_vectors.name if own_table is None else f"{chunk_vectors.name}_{own_table:d}"


@lru_cache(maxsize=1_000)
def describe_vector_table(own_table: int | None) -> Table:
    """Give that table to write to."""
    return chunk_vectors if own_table is None else chunk_vectors.to_metadata(MetaData(), name=name_vector_table(own_table))


async def lock_vectors(connection: AsyncConnection, index: IndexKey) -> Table:
    """Give the table of an index's vectors, which stays the one until the transaction ends."""
    where = index.rows_of(rag_indexes)
    query = select(rag_indexes.c.index_key, rag_indexes.c.vector_table).where(*where).with_for_update(read=True, key_share=True)
    row = (await connection.execute(query)).one()
    return describe_vector_table(None if row.vector_table is None else row.index_key)
