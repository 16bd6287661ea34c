"""Removes indexes that answer no more, or never will: in batches, so that no lock and no transaction lasts."""

from collections.abc import Sequence

from sqlalchemy import Select, Text, and_, cast, delete, exists, select
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.database import PostgresDatabase
from server.db.document_tables import IndexKey, chunk_terms, chunk_vectors, chunks, documents, rag_indexes
from server.db.rag_indexes import delete_index
from server.db.tables import IS_ACTIVE, IS_REINDEX, jobs, models

DOCUMENTS_PER_BATCH = 200


async def remove_idle_indexes(database: PostgresDatabase) -> Sequence[IndexKey]:
    """Remove every index that does not answer and that no job builds; give their keys. Safe to stop, and to run twice at once."""
    async with database.begin() as connection:
        rows = (await connection.execute(_select_idle())).all()
    removed = [IndexKey(row.organization, row.model_id, row.index_number) for row in rows]
    for index in removed:
        last_id: str | None = ""
        while last_id is not None:
            async with database.begin() as connection:
                last_id = await _remove_batch(connection, index, last_id)
        async with database.begin() as connection:
            await delete_index(connection, index)
    return removed


def _select_idle() -> Select[tuple[str, str, int]]:
    of_model = (models.c.organization == rag_indexes.c.organization, models.c.model_id == rag_indexes.c.model_id)
    built = exists().where(
        jobs.c.organization == rag_indexes.c.organization,
        jobs.c.model_id == rag_indexes.c.model_id,
        IS_ACTIVE,
        IS_REINDEX,
        jobs.c.spec["index_number"].astext == cast(rag_indexes.c.index_number, Text),
    )
    query = select(rag_indexes.c.organization, rag_indexes.c.model_id, rag_indexes.c.index_number).join(models, and_(*of_model))
    return query.where(rag_indexes.c.index_number != models.c.serving_index, ~built)


async def _remove_batch(connection: AsyncConnection, index: IndexKey, after_id: str) -> str | None:
    """Remove the chunks of some documents; give the last one's id, None after the last."""
    of_model = (documents.c.organization == index.organization, documents.c.model_id == index.model_id)
    query = select(documents.c.document_id).where(*of_model, documents.c.document_id > after_id)
    ids = (await connection.scalars(query.order_by(documents.c.document_id).limit(DOCUMENTS_PER_BATCH))).all()
    for table in (chunk_terms, chunk_vectors, chunks):
        await connection.execute(delete(table).where(*index.rows_of(table), table.c.document_id.in_(ids)))
    return ids[-1] if ids else None
