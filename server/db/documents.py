"""Rows of documents with their texts, chunks, vectors and terms, and the search over them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_commits import WARNINGS, describe_text
from server.db.document_tables import IndexKey, documents, rag_indexes, staged_documents
from server.db.quotes import find_quotes
from server.db.search import run_search
from server.db.staging import insert_staged, same_document
from server.db.terms import delete_terms
from server.domain.documents import DOCUMENT_INVALID, Document, DocumentFormat, DocumentState, NewDocument
from server.domain.errors import NotFound
from server.domain.ids import DOCUMENT, MODEL, is_id
from server.domain.retrieval import RetrievedChunk, Search
from server.domain.retrieval_evaluation import Span
from server.services.ports import DocumentOriginal, Page

_LISTED = [column for column in documents.c if column.name not in ("text", "page_starts", "headings")]


class PostgresDocuments:
    """The Documents of one organization, on an open transaction."""

    def __init__(self, connection: AsyncConnection, organization: str) -> None:
        self._connection = connection
        self._organization = organization

    async def insert(self, model_id: str, new: Sequence[tuple[str, NewDocument]], job_id: str = "") -> Sequence[Document]:
        """Add PENDING documents under the given new ids; their contents wait for a job. Raises NotFound where there is no such model."""
        if not is_id(model_id, MODEL):
            raise NotFound.of("model", model_id)
        if not new:
            return []
        key = {"organization": self._organization, "model_id": model_id, "job_id": job_id}
        rows = [key | {"document_id": each} | _describe(what) for each, what in new]
        statement = insert(documents).values(create_time=func.clock_timestamp()).returning(*_LISTED, sort_by_parameter_order=True)
        try:
            added = [document_from_row(row) for row in await self._connection.execute(statement, rows)]
        except IntegrityError as error:
            raise NotFound.of("model", model_id) from error
        await insert_staged(self._connection, self._organization, model_id, new)
        return added

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

    async def get_original(self, model_id: str, document_id: str) -> DocumentOriginal:
        """Read what a document was given as: the content that is found, else the one that waits. Raises NotFound."""
        mine = self._own(model_id, document_id)
        columns = (documents.c.text, documents.c.path, documents.c.format, documents.c.original_sha256)
        joined = documents.outerjoin(staged_documents, same_document())
        query = select(*columns, staged_documents.c.path.label("staged_path")).select_from(joined).where(*mine)
        row = (await self._connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound.of("document", document_id)
        return DocumentOriginal(row.text, row.path or row.staged_path or "", DocumentFormat(row.format) if row.format else None)

    async def get_text(self, model_id: str, document_id: str) -> str:
        """Read the text that is cited; empty while a file was not read yet. Raises NotFound."""
        text: str | None = await self._connection.scalar(select(documents.c.text).where(*self._own(model_id, document_id)))
        if text is None:
            raise NotFound.of("document", document_id)
        return text

    async def delete(self, model_id: str, document_id: str) -> Sequence[str]:
        """Remove a document with its chunks, vectors and terms, at once; give its files, for others to remove. Raises NotFound."""
        mine = self._own(model_id, document_id)
        indexes = (rag_indexes.c.organization == self._organization, rag_indexes.c.model_id == model_id)
        # The indexes before the document, as all who write: vectors that are on their way to another table have arrived.
        numbers = select(rag_indexes.c.index_number).where(*indexes).order_by(rag_indexes.c.index_number)
        written = (await self._connection.scalars(numbers.with_for_update(read=True, key_share=True))).all()
        # Locked first: a job that writes its chunks meanwhile would leave their terms counted.
        path = await self._connection.scalar(select(documents.c.path).where(*mine).with_for_update())
        if path is None:
            raise NotFound.of("document", document_id)
        waiting = select(staged_documents.c.path).where(
            staged_documents.c.organization == self._organization,
            staged_documents.c.model_id == model_id,
            staged_documents.c.document_id == document_id,
        )
        paths = [path, *(await self._connection.scalars(waiting)).all()]
        for number in written:
            await delete_terms(self._connection, IndexKey(self._organization, model_id, number), document_id)
        await self._connection.execute(delete(documents).where(*mine))
        return [each for each in paths if each]

    async def search(self, model_id: str, search: Search) -> Sequence[RetrievedChunk]:
        """Give the chunks that a search finds, best first, none below the threshold (`1 - cosine distance`) where vectors are compared.

        Raises InvalidInput for numbers that are none, FailedPrecondition for a vector of another dimension, PlaceChanged.
        """
        if not is_id(model_id, MODEL) or search.settings.top_k < 1:
            return []
        return await run_search(self._connection, IndexKey(self._organization, model_id, search.index_number), search)

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
        error_reason=row.error_reason or DOCUMENT_INVALID,
        job_id=row.job_id,
        format=DocumentFormat(row.format) if row.format else None,
        page_count=row.page_count,
        warnings=WARNINGS.from_json(row.warnings),
        update_time=row.update_time,
        update_pending=row.state == DocumentState.INDEXED and row.revision != row.content_revision and not row.error,
        original_size_bytes=row.original_size_bytes,
        original_sha256=row.original_sha256,
    )


def _describe(new: NewDocument) -> dict[str, Any]:
    """Give the columns of a new document, but for its key. A file's text is not known yet."""
    nothing = {"size_characters": 0, "size_bytes": 0, "content_sha256": ""}
    return {
        "title": new.title,
        "source_uri": new.source_uri,
        "text": new.text,
        "metadata": dict(new.metadata),
        "state": DocumentState.PENDING,
        **(nothing if new.file else describe_text(new.text)),
        "chunk_count": 0,
        "error": "",
        "error_reason": "",
        "revision": 1,
        "content_revision": 0,
        "path": "",
        "format": "",
        "original_size_bytes": new.size_bytes,
        "original_sha256": new.sha256,
        "page_count": 0,
        "page_starts": [],
        "headings": [],
        "warnings": [],
    }
