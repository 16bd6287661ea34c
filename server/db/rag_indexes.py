"""Rows of a RAG model's indexes."""

from typing import Any

from sqlalchemy import ColumnElement, Row, Text, func, insert, literal_column, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey, rag_indexes
from server.domain.errors import FailedPrecondition
from server.domain.rag_indexes import IndexState, RagIndex
from server.domain.retrieval import Chunking
from server.services.codec import Codec

_CHUNKING = Codec[Chunking](Chunking)
# The columns as a model's row carries those of the index that answers.
# The versions of both rows: any change of the model, or of its index, gives a new one, and nobody can forget to count it up.
PLACE_REVISION: ColumnElement[str] = literal_column("models.xmin || '.' || rag_indexes.xmin", Text).label("place_revision")
INDEX_COLUMNS = [column.label(f"index_{column.name}") for column in rag_indexes.c if column.name not in ("organization", "model_id")]


async def insert_index(connection: AsyncConnection, index: IndexKey, embedding_model: str, chunking: Chunking) -> None:
    """Add an index without chunks, BUILDING."""
    values = {
        "state": IndexState.BUILDING,
        "embedding_model": embedding_model,
        "chunking": _CHUNKING.to_json(chunking),
        "revision": "",
        "fingerprint": "",
        "create_time": func.clock_timestamp(),
    }
    await connection.execute(insert(rag_indexes).values(index.columns | values))


async def fix_dimension(connection: AsyncConnection, index: IndexKey, dimension: int) -> None:
    """Let the first document decide the dimension of all vectors of an index. Raises FailedPrecondition for another one."""
    own = index.rows_of(rag_indexes)
    known = await connection.scalar(select(rag_indexes.c.dimension).where(*own))
    if known is None:
        first = update(rag_indexes).where(*own).values(dimension=func.coalesce(rag_indexes.c.dimension, dimension))
        known = await connection.scalar(first.returning(rag_indexes.c.dimension))
    if known != dimension:
        raise FailedPrecondition(
            f"The model's vectors have {known} numbers each, the new ones {dimension}.", reason="EMBEDDING_DIMENSION_MISMATCH"
        )


async def mark_ready(connection: AsyncConnection, index: IndexKey) -> None:
    """Note that a job of the index ended well."""
    await connection.execute(update(rag_indexes).where(*index.rows_of(rag_indexes)).values(state=IndexState.READY))


def index_from_row(row: Row[Any]) -> RagIndex | None:
    """Read INDEX_COLUMNS; None where the model has no index."""
    if row.index_index_number is None:
        return None
    return RagIndex(
        index_number=row.index_index_number,
        embedding_model=row.index_embedding_model,
        chunking=_CHUNKING.from_json(row.index_chunking),
        state=IndexState(row.index_state),
        create_time=row.index_create_time,
        index_key=row.index_index_key,
        dimension=row.index_dimension,
        vector_table=row.index_vector_table,
        place_revision=getattr(row, "place_revision", ""),
    )
