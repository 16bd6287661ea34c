"""Contents of documents that wait to be indexed: found again by source or content, put beside what is there, read by the index job."""

import hashlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, ScalarSelect, and_, func, insert, or_, select, union, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import HAS_ORIGINAL, HAS_SOURCE, IndexKey, chunks, documents, staged_documents
from server.domain.documents import DocumentState, NewDocument
from server.domain.errors import NotFound
from server.domain.orders import StagedDocument
from server.services.ports import KnownDocument

_NOT_REUSABLE = ""  # the hash of a chunk that was cut before hashes were kept


class PostgresStagedDocuments:
    """The StagedDocuments of one organization, on an open transaction."""

    def __init__(self, connection: AsyncConnection, organization: str) -> None:
        self._connection = connection
        self._organization = organization

    async def list_known(self, model_id: str, new: Sequence[NewDocument]) -> Sequence[KnownDocument]:
        """Give the model's documents that any of `new` may be: of the same id, source or content; each as its latest content has it."""
        staged = staged_documents.c
        latest = [func.coalesce(staged[name], documents.c[name]).label(name) for name in ("title", "source_uri", "metadata")]
        sha256 = func.coalesce(staged.sha256, documents.c.original_sha256).label("sha256")
        waits = staged.revision.is_not(None).label("is_waiting")
        joined = documents.outerjoin(staged_documents, same_document())
        query = select(documents.c.document_id, documents.c.state, *latest, sha256, waits).select_from(joined)
        query = query.where(*self._of_model(documents, model_id), documents.c.document_id.in_(self._may_be(model_id, new)))
        return [
            KnownDocument(
                row.document_id, DocumentState(row.state), row.title, row.source_uri, row.metadata, row.sha256, is_waiting=row.is_waiting
            )
            for row in await self._connection.execute(query.order_by(documents.c.document_id))
        ]

    def _may_be(self, model_id: str, new: Sequence[NewDocument]) -> CompoundSelect[str]:
        """Select the ids of documents that any of `new` may be, each kind by its index."""
        ids = [document.document_id for document in new if document.document_id]
        sources = [document.source_uri for document in new if document.source_uri]
        hashes = [document.sha256 for document in new]
        keys = [hashlib.md5(source.encode(), usedforsecurity=False).hexdigest() for source in sources]
        of_model = select(documents.c.document_id).where(*self._of_model(documents, model_id))
        waiting = select(staged_documents.c.document_id).where(*self._of_model(staged_documents, model_id))
        return union(
            of_model.where(documents.c.document_id.in_(ids)),
            of_model.where(HAS_SOURCE, func.md5(documents.c.source_uri).in_(keys)),
            of_model.where(HAS_ORIGINAL, documents.c.original_sha256.in_(hashes)),
            waiting.where(or_(staged_documents.c.sha256.in_(hashes), staged_documents.c.source_uri.in_(sources))),
        )

    async def stage(self, model_id: str, document_id: str, new: NewDocument, job_id: str) -> str:
        """Let a content wait for a job, in place of one that waits already; give that one's file, empty where there is none.

        A document that FAILED is PENDING again. Raises NotFound.
        """
        own = (*self._of_model(documents, model_id), documents.c.document_id == document_id)
        state = func.coalesce(func.nullif(documents.c.state, DocumentState.FAILED.value), DocumentState.PENDING.value)
        values = {"revision": documents.c.revision + 1, "job_id": job_id, "error": "", "error_reason": "", "state": state}
        revision = await self._connection.scalar(update(documents).where(*own).values(values).returning(documents.c.revision))
        if revision is None:
            raise NotFound.of("document", document_id)
        key = {"organization": self._organization, "model_id": model_id, "document_id": document_id}
        of_document = (*self._of_model(staged_documents, model_id), staged_documents.c.document_id == document_id)
        dropped = await self._connection.scalar(select(staged_documents.c.path).where(*of_document))
        content = describe_staged(new) | {"revision": revision}
        statement = postgresql.insert(staged_documents).values(key | content)
        await self._connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=content))
        return dropped or ""

    async def describe(self, model_id: str, document_id: str, new: NewDocument) -> None:
        """Change title, source and metadata of a document whose content stays; nothing is indexed again for it."""
        own = (*self._of_model(documents, model_id), documents.c.document_id == document_id)
        values = {"title": new.title, "source_uri": new.source_uri, "metadata": dict(new.metadata)}
        await self._connection.execute(update(documents).where(*own).values(values))

    async def is_any_waiting(self, model_id: str) -> bool:
        """Tell whether any content of a model waits to be indexed."""
        query = select(staged_documents.c.document_id).where(*self._of_model(staged_documents, model_id)).limit(1)
        return await self._connection.scalar(query) is not None

    def _of_model(self, table: Any, model_id: str) -> tuple[ColumnElement[bool], ...]:
        return table.c.organization == self._organization, table.c.model_id == model_id


async def insert_staged(connection: AsyncConnection, organization: str, model_id: str, new: Sequence[tuple[str, NewDocument]]) -> None:
    """Let the first contents of new documents wait."""
    key = {"organization": organization, "model_id": model_id, "revision": 1}
    rows = [key | {"document_id": document_id} | describe_staged(document) for document_id, document in new]
    await connection.execute(insert(staged_documents), rows)


def describe_staged(new: NewDocument) -> dict[str, Any]:
    """Give the columns of a content that waits, but for its key and revision."""
    return {
        "title": new.title,
        "source_uri": new.source_uri,
        "metadata": dict(new.metadata),
        "text": new.text,
        "path": new.file.path if new.file else "",
        "size_bytes": new.size_bytes,
        "sha256": new.sha256,
    }


async def read_staged(connection: AsyncConnection, index: IndexKey, after_id: str, limit: int) -> list[StagedDocument]:
    """Read contents that wait, by their documents' ids, each with the hashes of the chunks that the index has of its document."""
    staged = staged_documents.c
    query = select(staged_documents, _known_chunks(index).label("known_chunks")).where(
        staged.organization == index.organization, staged.model_id == index.model_id, staged.document_id > after_id
    )
    rows = (await connection.execute(query.order_by(staged.document_id).limit(limit))).all()
    return [
        StagedDocument(row.document_id, row.title, row.text, row.path, row.revision, row.source_uri, tuple(row.known_chunks or ()))
        for row in rows
    ]


def _known_chunks(index: IndexKey) -> ScalarSelect[Any]:
    hashes = select(func.array_agg(chunks.c.content_hash)).where(
        *index.rows_of(chunks), chunks.c.document_id == staged_documents.c.document_id, chunks.c.content_hash != _NOT_REUSABLE
    )
    return hashes.correlate(staged_documents).scalar_subquery()


def same_document() -> ColumnElement[bool]:
    """Give the condition that joins documents with what waits of them."""
    names = ("organization", "model_id", "document_id")
    return and_(*(documents.c[name] == staged_documents.c[name] for name in names))
