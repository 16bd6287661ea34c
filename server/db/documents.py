"""Rows of documents with their texts, chunks and vectors, and the exact search over them."""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any

from psycopg import DataError as DataException
from sqlalchemy import ColumnElement, Double, Row, cast, delete, func, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.tables import HalfVector, chunk_vectors, chunks, documents
from server.domain.documents import Document, DocumentState, NewDocument
from server.domain.errors import FailedPrecondition, InvalidInput, NotFound
from server.domain.ids import DOCUMENT, MODEL, is_id
from server.domain.retrieval import Chunk, RetrievedChunk, Scores
from server.services.ports import Page

# Rounding aside, no similarity is above 1. The bound keeps NaN out, which PostgreSQL sorts above every number.
MAX_SIMILARITY = 2.0
FLOAT16_BYTES = 2
DATA_EXCEPTION = "22000"  # pgvector: the dimensions differ
_LISTED = [column for column in documents.c if column.name != "text"]


class PostgresDocuments:
    """The Documents of one organization, on an open transaction."""

    def __init__(self, connection: AsyncConnection, organization: str) -> None:
        self._connection = connection
        self._organization = organization

    async def insert(self, model_id: str, new: Sequence[tuple[str, NewDocument]]) -> Sequence[Document]:
        """Add PENDING documents under the given new ids. Raises NotFound where there is no such model."""
        if not is_id(model_id, MODEL):
            raise NotFound.of("model", model_id)
        if not new:
            return []
        rows = [{"organization": self._organization, "model_id": model_id, "document_id": each} | _describe(what) for each, what in new]
        statement = insert(documents).values(create_time=func.clock_timestamp()).returning(*_LISTED, sort_by_parameter_order=True)
        try:
            return [document_from_row(row) for row in await self._connection.execute(statement, rows)]
        except IntegrityError as error:
            raise NotFound.of("model", model_id) from error

    async def get(self, model_id: str, document_id: str) -> Document:
        """Read a document without its text. Raises NotFound."""
        conditions = self._own(model_id, document_id)
        row = (await self._connection.execute(select(*_LISTED).where(*conditions))).one_or_none()
        if row is None:
            raise NotFound.of("document", document_id)
        return document_from_row(row)

    async def list(self, model_id: str, page: Page, state: DocumentState | None = None) -> Sequence[Document]:
        """List documents, newest first; None takes all states."""
        if not is_id(model_id, MODEL):
            return []
        conditions = [documents.c.organization == self._organization, documents.c.model_id == model_id]
        conditions += [documents.c.state == state] if state else []
        conditions += [documents.c.document_id < page.before_id] if page.before_id is not None else []
        query = select(*_LISTED).where(*conditions).order_by(documents.c.document_id.desc()).limit(page.size)
        return [document_from_row(row) for row in await self._connection.execute(query)]

    async def delete(self, model_id: str, document_id: str) -> None:
        """Remove a document with its chunks and vectors, at once. Raises NotFound."""
        result = await self._connection.execute(delete(documents).where(*self._own(model_id, document_id)))
        if not result.rowcount:
            raise NotFound.of("document", document_id)

    async def search(self, model_id: str, vector: Sequence[float], top_k: int, similarity_threshold: float) -> Sequence[RetrievedChunk]:
        """Give the chunks most similar to a unit vector, best first, none below the threshold (`1 - cosine distance`).

        Every vector of the model is compared: the result is exact. Raises InvalidInput for numbers that are none, FailedPrecondition
        for a vector of another dimension.
        """
        if not is_id(model_id, MODEL) or top_k < 1:
            return []
        if not all(map(math.isfinite, vector)):
            raise InvalidInput("The query's vector has numbers that are not finite.", reason="EMBEDDING_NOT_FINITE")
        query = build_search(self._organization, model_id, vector, top_k, similarity_threshold)
        try:
            return [_retrieved_from_row(row) for row in await self._connection.execute(query)]
        except DBAPIError as error:
            if isinstance(error.orig, DataException) and error.orig.sqlstate == DATA_EXCEPTION:
                raise FailedPrecondition(
                    f"The model's vectors do not have {len(vector)} numbers each.", reason="EMBEDDING_DIMENSION_MISMATCH"
                ) from error
            raise

    def _own(self, model_id: str, document_id: str) -> tuple[ColumnElement[bool], ...]:
        if not is_id(model_id, MODEL) or not is_id(document_id, DOCUMENT):
            raise NotFound.of("document", document_id)
        return documents.c.organization == self._organization, documents.c.model_id == model_id, documents.c.document_id == document_id


def build_search(organization: str, model_id: str, vector: Sequence[float], top_k: int, similarity_threshold: float) -> Any:
    """Build the one statement of a search: the nearest vectors first, then their texts, titles and metadata."""
    asked = cast("[" + ",".join(map(repr, vector)) + "]", HalfVector)
    distance: ColumnElement[float] = chunk_vectors.c.embedding.op("<=>", return_type=Double())(asked)
    mine = (documents.c.organization == organization, documents.c.model_id == model_id)
    indexed = select(documents.c.document_id).where(*mine, documents.c.state == DocumentState.INDEXED)
    key = (chunk_vectors.c.document_id, chunk_vectors.c.position)
    scan = select(*key, (1 - distance).label("similarity")).where(
        chunk_vectors.c.organization == organization, chunk_vectors.c.model_id == model_id, chunk_vectors.c.document_id.in_(indexed)
    )
    # The threshold after the limit: below it lie the last ones only, and each distance is computed once.
    nearest = scan.order_by(distance, *key).limit(top_k).subquery("nearest")
    of_chunk = (chunks.c.document_id == nearest.c.document_id) & (chunks.c.position == nearest.c.position)
    of_document = documents.c.document_id == nearest.c.document_id
    return (
        select(chunks, documents.c.title, documents.c.metadata, nearest.c.similarity)
        .select_from(nearest)
        .join(chunks, of_chunk & (chunks.c.organization == organization) & (chunks.c.model_id == model_id))
        .join(documents, of_document & mine[0] & mine[1])
        .where(nearest.c.similarity.between(similarity_threshold, MAX_SIMILARITY))
        .order_by(nearest.c.similarity.desc(), nearest.c.document_id, nearest.c.position)
    )


async def replace_chunks(
    connection: AsyncConnection, organization: str, model_id: str, document_id: str, new: Sequence[Chunk], vectors: bytes, dimension: int
) -> None:
    """Write a document's chunks and vectors (little-endian float16, [chunks, dimension]) in place of those it had. Raises InvalidInput."""
    if len(vectors) != len(new) * dimension * FLOAT16_BYTES or (new and dimension < 1):
        raise InvalidInput(f"{len(vectors)} bytes are not {len(new)} vectors of {dimension} float16 numbers.")
    for table in (chunk_vectors, chunks):
        of_document = (table.c.organization == organization, table.c.model_id == model_id, table.c.document_id == document_id)
        await connection.execute(delete(table).where(*of_document))
    if not new:
        return
    key = {"organization": organization, "model_id": model_id, "document_id": document_id}
    await connection.execute(insert(chunks), [key | _describe_chunk(chunk) for chunk in new])
    rows = struct.iter_unpack(f"<{dimension}e", vectors)
    embedded = [
        key | {"position": chunk.position, "embedding": f"[{','.join(map(repr, row))}]"} for chunk, row in zip(new, rows, strict=True)
    ]
    await connection.execute(insert(chunk_vectors), embedded)


def document_from_row(row: Row[Any]) -> Document:
    """Read a row of `documents` without its text."""
    return Document(
        document_id=row.document_id,
        model_id=row.model_id,
        title=row.title,
        state=DocumentState(row.state),
        size_characters=row.size_characters,
        size_bytes=row.size_bytes,
        content_sha256=row.content_sha256,
        create_time=row.create_time,
        metadata=row.metadata,
        source_uri=row.source_uri,
        chunk_count=row.chunk_count,
        error=row.error,
    )


def _describe(new: NewDocument) -> dict[str, Any]:
    data = new.text.encode()
    return {
        "title": new.title,
        "source_uri": new.source_uri,
        "text": new.text,
        "metadata": dict(new.metadata),
        "state": DocumentState.PENDING,
        "size_characters": len(new.text),
        "size_bytes": len(data),
        "content_sha256": hashlib.sha256(data).hexdigest(),
        "chunk_count": 0,
        "error": "",
    }


def _describe_chunk(chunk: Chunk) -> dict[str, Any]:
    return {
        "position": chunk.position,
        "chunk_id": chunk.chunk_id,
        "text": chunk.text,
        "char_start": chunk.char_start,
        "char_end": chunk.char_end,
        "token_count": chunk.token_count,
        "page": chunk.page,
    }


def _retrieved_from_row(row: Row[Any]) -> RetrievedChunk:
    chunk = Chunk(row.chunk_id, row.position, row.text, row.char_start, row.char_end, row.token_count, row.page)
    return RetrievedChunk(chunk, row.document_id, row.title, Scores(similarity=row.similarity), row.metadata)
