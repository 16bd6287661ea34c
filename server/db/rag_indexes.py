"""Rows of a RAG model's indexes."""

from typing import Any

from sqlalchemy import ColumnElement, Row, Text, delete, func, insert, literal_column, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey, rag_indexes
from server.domain.errors import FailedPrecondition
from server.domain.rag_indexes import SPACE_CHANGED, Calibration, EmbeddingSpace, IndexState, MeasuredSpace, RagIndex
from server.domain.retrieval import Chunking
from server.services.codec import Codec

SPACE = Codec[EmbeddingSpace | None](EmbeddingSpace | None)
CALIBRATION = Codec[Calibration | None](Calibration | None)
_CHUNKING = Codec[Chunking](Chunking)
# The versions of both rows: any change of the model, or of its index, gives a new one, and nobody can forget to count it up.
PLACE_REVISION: ColumnElement[str] = literal_column("models.xmin || '.' || rag_indexes.xmin", Text).label("place_revision")
# The columns as a model's row carries those of the index that answers.
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


async def fix_space(connection: AsyncConnection, index: IndexKey, measured: MeasuredSpace) -> None:
    """Let the first document decide the space of all vectors of an index. Raises FailedPrecondition for another one.

    An index of before spaces were kept takes the first one; its dimension is fixed already.
    """
    own, space = index.rows_of(rag_indexes), measured.space
    known = await connection.scalar(select(rag_indexes.c.fingerprint).where(*own))
    if not known:
        values = {
            "space": SPACE.to_json(space),
            "fingerprint": space.fingerprint,
            "revision": space.revision,
            "calibration": CALIBRATION.to_json(measured.calibration),
        }
        # Of two jobs that are first at once, one waits here for the other and then finds it done.
        await connection.execute(update(rag_indexes).where(*own, rag_indexes.c.fingerprint == "").values(values))
        known = await connection.scalar(select(rag_indexes.c.fingerprint).where(*own))
    if known != space.fingerprint:
        raise FailedPrecondition(
            f"{space.embedding_model} as it is here now gives other vectors than those of the model's index.",
            reason=SPACE_CHANGED,
            metadata={"index_fingerprint": known or "", "fingerprint": space.fingerprint},
        )


async def delete_index(connection: AsyncConnection, index: IndexKey) -> None:
    """Remove an index whose chunks are removed, and its counts with it."""
    await connection.execute(delete(rag_indexes).where(*index.rows_of(rag_indexes)))


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
        space=SPACE.from_json(row.index_space),
        calibration=CALIBRATION.from_json(row.index_calibration),
    )
