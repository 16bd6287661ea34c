"""How an index job's word on a document is written: the content that was read takes the place of the one before, or the reason why not.

One transaction of the caller's holds all of it: whoever searches sees the old chunks or the new ones.
"""

import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from sqlalchemy import ColumnElement, Row, Table, Text, cast, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey, chunks, documents, staged_documents
from server.db.terms import delete_terms, insert_terms
from server.db.vector_tables import lock_vectors
from server.domain.documents import DocumentHeading, DocumentReading, DocumentState, DocumentWarning
from server.domain.errors import InvalidInput
from server.domain.retrieval import Chunk
from server.services.codec import Codec

FLOAT16_BYTES = 2
HEADINGS = Codec[Sequence[DocumentHeading]](Sequence[DocumentHeading])
WARNINGS = Codec[Sequence[DocumentWarning]](Sequence[DocumentWarning])
_SUPERSEDED = "Newer content of the document has come meanwhile; it is indexed in place of this."
_DELETED = "The document was deleted while it was being indexed."


class ChunksChanged(Exception):
    """Chunks whose vectors were to be reused are not there any more: another job has replaced them. Trying again helps."""


@dataclass(frozen=True, slots=True)
class DocumentKey:
    """A document in an index, as the keys of its rows name it."""

    index: IndexKey
    document_id: str

    @property
    def columns(self) -> dict[str, Any]:
        """The values of the key's columns, in a table of chunks."""
        return self.index.columns | {"document_id": self.document_id}

    def rows_of(self, table: Table) -> tuple[ColumnElement[bool], ...]:
        """The conditions that choose this document's rows of a table: of chunks those of the index, else whatever the index."""
        return tuple(table.c[name] == value for name, value in self.columns.items() if name in table.c)


@dataclass(frozen=True, slots=True)
class Committed:
    """What came of a commit: whether it settled a content that waited, what is to be said of it, and files that nobody names any more."""

    is_settled: bool
    said: str = ""
    is_stored: bool = False
    dropped_paths: Sequence[str] = ()


async def commit_document(
    connection: AsyncConnection,
    key: DocumentKey,
    new: Sequence[Chunk],
    vectors: bytes,
    dimension: int,
    error: str,
    reading: DocumentReading,
) -> Committed:
    """Settle the content that was read: store its chunks, or `error`. A document that is gone, or has newer content, is left alone.

    Raises InvalidInput, ChunksChanged.
    """
    # Before the document, as everybody who writes: vectors that move to another table have arrived there.
    vector_table = await lock_vectors(connection, key.index)
    query = select(documents.c.state, documents.c.path, documents.c.content_revision).where(*key.rows_of(documents))
    row = (await connection.execute(query.with_for_update())).one_or_none()
    if row is None:
        return Committed(True, _DELETED)
    staged = (await connection.execute(select(staged_documents).where(*key.rows_of(staged_documents)))).one_or_none()
    if reading.revision is not None and (staged is None or staged.revision != reading.revision):
        # The same job's word once more, after its first write went through unheard, says nothing new.
        return Committed(False) if row.content_revision == reading.revision else Committed(True, _SUPERSEDED)
    if error:
        await _store_error(connection, key, error, reading, was_found=row.state == DocumentState.INDEXED)
    else:
        await replace_chunks(connection, key, vector_table, new, vectors, dimension, reading.reused)
        await _store_content(connection, key, staged, len(new), reading)
    if staged is None:
        return Committed(False, error, not error)
    await connection.execute(delete(staged_documents).where(*key.rows_of(staged_documents)))
    dropped = staged.path if error else row.path
    return Committed(True, error, not error, [dropped] if dropped else [])


async def _store_error(connection: AsyncConnection, key: DocumentKey, error: str, reading: DocumentReading, *, was_found: bool) -> None:
    """Say why the latest content could not be indexed. A content before it still answers."""
    values: dict[str, Any] = {"error": error, "error_reason": reading.error_reason, "update_time": func.clock_timestamp()}
    if not was_found:
        values |= {"state": DocumentState.FAILED, "chunk_count": 0}
    await connection.execute(update(documents).where(*key.rows_of(documents)).values(values))


async def _store_content(
    connection: AsyncConnection, key: DocumentKey, staged: Row[Any] | None, chunk_count: int, reading: DocumentReading
) -> None:
    values: dict[str, Any] = {"state": DocumentState.INDEXED, "chunk_count": chunk_count, "error": "", "error_reason": ""}
    values |= {"update_time": func.clock_timestamp()}
    if staged is not None:
        content = reading.content
        text = content.text if content else staged.text
        values |= {
            "content_revision": staged.revision,
            "title": staged.title or (content.title if content else ""),
            "source_uri": staged.source_uri,
            "metadata": staged.metadata,
            "path": staged.path,
            "original_size_bytes": staged.size_bytes,
            "original_sha256": staged.sha256,
            "text": text,
            **describe_text(text),
            "format": (content.format or "") if content else "",
            "page_count": len(content.page_starts) if content else 0,
            "page_starts": list(content.page_starts) if content else [],
            "headings": HEADINGS.to_json(content.headings if content else []),
            "warnings": WARNINGS.to_json(content.warnings if content else []),
        }
    await connection.execute(update(documents).where(*key.rows_of(documents)).values(values))


async def replace_chunks(
    connection: AsyncConnection,
    key: DocumentKey,
    vector_table: Table,
    new: Sequence[Chunk],
    vectors: bytes,
    dimension: int,
    reused: Sequence[int] = (),
) -> None:
    """Write a document's chunks, their terms and vectors in place of those it had.

    `vectors` are little-endian float16 [chunks that are not reused, dimension]; those at the positions `reused` keep id and vector.
    Raises InvalidInput, ChunksChanged.
    """
    fresh = len(new) - len(reused)
    if len(vectors) != fresh * dimension * FLOAT16_BYTES or (new and dimension < 1):
        raise InvalidInput(f"{len(vectors)} bytes are not {fresh} vectors of {dimension} float16 numbers.")
    old = await _read_old(connection, key, vector_table) if reused else {}
    written, embeddings = _take_over(new, old, vectors, dimension, set(reused))
    await delete_terms(connection, key.index, key.document_id)
    for table in (vector_table, chunks):
        await connection.execute(delete(table).where(*key.rows_of(table)))
    if not new:
        return
    await connection.execute(insert(chunks), [key.columns | _describe_chunk(chunk) for chunk in written])
    rows = [key.columns | {"position": chunk.position, "embedding": each} for chunk, each in zip(written, embeddings, strict=True)]
    await connection.execute(insert(vector_table), rows)
    await insert_terms(connection, key.index, key.document_id, written)


def _take_over(
    new: Sequence[Chunk], old: Mapping[str, list[tuple[str, str]]], vectors: bytes, dimension: int, reused: set[int]
) -> tuple[list[Chunk], list[str]]:
    """Give the chunks as they will be written, with their vectors: the new ones', and those of equal chunks that are there."""
    rows = struct.iter_unpack(f"<{dimension}e", vectors) if vectors else iter(())
    written, embeddings = [], []
    for chunk in new:
        if chunk.position not in reused:
            written.append(chunk)
            embeddings.append(f"[{','.join(map(repr, next(rows)))}]")
        elif same := old.get(chunk.content_hash):
            chunk_id, embedding = same.pop(0)
            written.append(replace(chunk, chunk_id=chunk_id))
            embeddings.append(embedding)
        else:
            raise ChunksChanged
    return written, embeddings


async def _read_old(connection: AsyncConnection, key: DocumentKey, vector_table: Table) -> dict[str, list[tuple[str, str]]]:
    """Give id and vector of the chunks that are there, by their hashes."""
    same = tuple(chunks.c[name] == vector_table.c[name] for name in ("organization", "model_id", "document_id", "index_number", "position"))
    query = select(chunks.c.content_hash, chunks.c.chunk_id, cast(vector_table.c.embedding, Text).label("embedding"))
    query = query.where(*key.rows_of(chunks), *same).order_by(chunks.c.position)
    old: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in await connection.execute(query):
        old[row.content_hash].append((row.chunk_id, row.embedding))
    return old


def describe_text(text: str) -> dict[str, Any]:
    """Give the columns that measure a document's text."""
    data = text.encode()
    return {"size_characters": len(text), "size_bytes": len(data), "content_sha256": sha256(data).hexdigest()}


def _describe_chunk(chunk: Chunk) -> dict[str, Any]:
    return {
        "position": chunk.position,
        "chunk_id": chunk.chunk_id,
        "text": chunk.text,
        "char_start": chunk.char_start,
        "char_end": chunk.char_end,
        "token_count": chunk.token_count,
        "page": chunk.page,
        "heading_path": list(chunk.heading_path),
        "content_hash": chunk.content_hash,
    }
