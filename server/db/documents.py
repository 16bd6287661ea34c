"""Rows of documents with their texts, chunks, vectors and terms, and the search over them."""

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from psycopg import DataError as DataException
from sqlalchemy import ColumnElement, Row, delete, func, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey, chunk_vectors, chunks, documents, rag_indexes
from server.db.quotes import find_quotes
from server.db.search import build_search
from server.db.terms import delete_terms, insert_terms
from server.domain.documents import Document, DocumentState, NewDocument
from server.domain.errors import FailedPrecondition, InvalidInput, NotFound
from server.domain.ids import DOCUMENT, MODEL, is_id
from server.domain.retrieval import Chunk, RetrievedChunk, Scores, Search
from server.domain.retrieval_evaluation import Span
from server.services.ports import Page

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
        """Remove a document with its chunks, vectors and terms, at once. Raises NotFound."""
        mine = self._own(model_id, document_id)
        # Locked first: a job that writes its chunks meanwhile would leave their terms counted.
        if await self._connection.scalar(select(documents.c.document_id).where(*mine).with_for_update()) is None:
            raise NotFound.of("document", document_id)
        numbers = select(rag_indexes.c.index_number).where(
            rag_indexes.c.organization == self._organization, rag_indexes.c.model_id == model_id
        )
        for number in (await self._connection.scalars(numbers.order_by(rag_indexes.c.index_number))).all():
            await delete_terms(self._connection, IndexKey(self._organization, model_id, number), document_id)
        await self._connection.execute(delete(documents).where(*mine))

    async def search(self, model_id: str, search: Search) -> Sequence[RetrievedChunk]:
        """Give the chunks that a search finds, best first, none below the threshold (`1 - cosine distance`) where vectors are compared.

        Every vector of the model is compared: that leg is exact. Raises InvalidInput for numbers that are none, FailedPrecondition
        for a vector of another dimension.
        """
        if not is_id(model_id, MODEL) or search.settings.top_k < 1:
            return []
        if not all(map(math.isfinite, search.vector)):
            raise InvalidInput("The query's vector has numbers that are not finite.", reason="EMBEDDING_NOT_FINITE")
        statement, parameters = build_search(self._organization, model_id, search)
        try:
            return [_retrieved_from_row(row) for row in await self._connection.execute(statement, parameters)]
        except DBAPIError as error:
            if isinstance(error.orig, DataException) and error.orig.sqlstate == DATA_EXCEPTION:
                raise FailedPrecondition(
                    f"The model's vectors do not have {len(search.vector)} numbers each.", reason="EMBEDDING_DIMENSION_MISMATCH"
                ) from error
            raise

    async def read_sizes(self, model_id: str, document_ids: Sequence[str]) -> Mapping[str, int]:
        """Give the characters of those of the documents that are indexed."""
        of_model = (documents.c.organization == self._organization, documents.c.model_id == model_id)
        wanted = (documents.c.document_id == func.any(list(document_ids)), documents.c.state == DocumentState.INDEXED)
        rows = await self._connection.execute(select(documents.c.document_id, documents.c.size_characters).where(*of_model, *wanted))
        return {row.document_id: row.size_characters for row in rows}

    async def find_quotes(self, model_id: str, index_number: int, quotes: Sequence[tuple[str, str]]) -> Sequence[Sequence[Span]]:
        """Give the places of each quote (a document's id, or an empty one for all, and a text) in indexed documents."""
        return await find_quotes(self._connection, IndexKey(self._organization, model_id, index_number), quotes)

    async def list_unknown_keys(self, model_id: str, keys: Sequence[str]) -> Sequence[str]:
        """Give those of the keys that no indexed document's metadata has; none where no document is indexed. Reads every document."""
        if not is_id(model_id, MODEL):
            return []
        mine = (documents.c.organization == self._organization, documents.c.model_id == model_id)
        known = select(*(func.bool_or(func.jsonb_exists(documents.c.metadata, key)) for key in keys)).where(
            *mine, documents.c.state == DocumentState.INDEXED
        )
        row = (await self._connection.execute(known)).one()
        return [key for key, is_known in zip(keys, row, strict=True) if is_known is False]

    def _own(self, model_id: str, document_id: str) -> tuple[ColumnElement[bool], ...]:
        if not is_id(model_id, MODEL) or not is_id(document_id, DOCUMENT):
            raise NotFound.of("document", document_id)
        return documents.c.organization == self._organization, documents.c.model_id == model_id, documents.c.document_id == document_id


async def replace_chunks(
    connection: AsyncConnection, index: IndexKey, document_id: str, new: Sequence[Chunk], vectors: bytes, dimension: int
) -> None:
    """Write a document's chunks in an index, their terms and vectors (little-endian float16, [chunks, dimension]) in place of those it had.

    Raises InvalidInput.
    """
    if len(vectors) != len(new) * dimension * FLOAT16_BYTES or (new and dimension < 1):
        raise InvalidInput(f"{len(vectors)} bytes are not {len(new)} vectors of {dimension} float16 numbers.")
    await delete_terms(connection, index, document_id)
    for table in (chunk_vectors, chunks):
        await connection.execute(delete(table).where(*index.rows_of(table), table.c.document_id == document_id))
    if not new:
        return
    key = index.columns | {"document_id": document_id}
    await connection.execute(insert(chunks), [key | _describe_chunk(chunk) for chunk in new])
    rows = struct.iter_unpack(f"<{dimension}e", vectors)
    embedded = [
        key | {"position": chunk.position, "embedding": f"[{','.join(map(repr, row))}]"} for chunk, row in zip(new, rows, strict=True)
    ]
    await connection.execute(insert(chunk_vectors), embedded)
    await insert_terms(connection, index, document_id, new)


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
    return RetrievedChunk(chunk, row.document_id, row.title, Scores(row.similarity, row.lexical, row.fused), row.metadata)
