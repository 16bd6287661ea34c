"""An index that is built beside the one that answers: what it has of each document, and how it comes to answer.

The switch is one transaction under the model's row lock, which finds no document that the new index lacks or has in an older content.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Row, case, delete, exists, func, literal, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.elements import ColumnElement

from server.db import settlement
from server.db.document_commits import HEADINGS, Committed, DocumentKey, replace_chunks
from server.db.document_tables import IndexKey, documents, reindexed_documents
from server.db.locked_job import LockedJob
from server.db.rag_indexes import mark_ready
from server.db.tables import IS_ACTIVE, IS_REINDEX, jobs, models
from server.db.vector_tables import lock_vectors
from server.domain.documents import DocumentContent, DocumentFormat, DocumentReading, DocumentState
from server.domain.jobs import JobKind, JobState
from server.domain.orders import StagedDocument
from server.domain.retrieval import Chunk
from server.domain.specs import IndexSpec
from server.services.codec import Codec

# Why a job begins another attempt: documents came while it built the index; the index that it worked for answers no more.
DOCUMENTS_CHANGED = "DOCUMENTS_CHANGED"
SWITCHED = "INDEX_SWITCHED"
_CHANGED = "The document was changed or deleted while the index was built; what it is now comes in another round."
_INDEX = Codec[IndexSpec](IndexSpec)


async def read_lacking(connection: AsyncConnection, index: IndexKey, after_id: str, limit: int) -> list[StagedDocument]:
    """Read the documents that are found but that the index does not have as they are, by their ids, to be cut and embedded for it."""
    query = select(documents).where(*_lacking(index), documents.c.document_id > after_id).order_by(documents.c.document_id).limit(limit)
    return [_staged_from_row(row) for row in await connection.execute(query)]


async def commit_reindexed(
    connection: AsyncConnection,
    key: DocumentKey,
    new: Sequence[Chunk],
    vectors: bytes,
    dimension: int,
    error: str,
    reading: DocumentReading,
) -> Committed:
    """Store a document's chunks in the index, or why it has none there. The document itself stays as the other index has it.

    One that is gone, or has other content by now, is left alone. Raises InvalidInput.
    """
    vector_table = await lock_vectors(connection, key.index)
    query = select(documents.c.state, documents.c.content_revision).where(*key.rows_of(documents)).with_for_update()
    row = (await connection.execute(query)).one_or_none()
    if row is None or row.state != DocumentState.INDEXED or row.content_revision != reading.revision:
        return Committed(True, _CHANGED)
    await replace_chunks(connection, key, vector_table, new, vectors, dimension)
    values = {
        "content_revision": row.content_revision,
        "chunk_count": len(new),
        "error": error,
        "error_reason": reading.error_reason if error else "",
    }
    statement = postgresql.insert(reindexed_documents).values(key.columns | values)
    await connection.execute(statement.on_conflict_do_update(index_elements=list(key.columns), set_=values))
    return Committed(True, error, not error)


async def switch_index(connection: AsyncConnection, job: LockedJob) -> bool:
    """Let the index of a locked job answer, with all its documents; False where it lacks some by now and nothing was changed.

    The model's other index jobs go on in the new index: those that run are put back into the queue.
    """
    spec = _INDEX.from_json(job.row.spec)
    index = IndexKey(job.row.organization, job.row.model_id, spec.index_number)
    own = (models.c.organization == index.organization, models.c.model_id == index.model_id)
    # Jobs before the model, as whoever ends a job does it; and once more for those that came between.
    await _lock_others(connection, index)
    await connection.execute(select(models.c.model_id).where(*own).with_for_update())
    others = await _lock_others(connection, index)
    if await connection.scalar(select(exists().where(*_lacking(index)))):
        return False
    await _take_over_documents(connection, index)
    rag = literal({"embedding_model": spec.embedding_model, "chunking": job.row.spec["chunking"]}, JSONB)
    values = {"serving_index": index.index_number, "rag": models.c.rag.op("||")(rag), "update_time": func.clock_timestamp()}
    await connection.execute(update(models).where(*own).values(values))
    await mark_ready(connection, index)
    for other in others:
        await _send_to(connection, other, replace(spec, is_reindex=False))
    return True


async def _lock_others(connection: AsyncConnection, index: IndexKey) -> list[Row[Any]]:
    """Lock the jobs that index what is added to the model. While its row is locked too, no further one comes."""
    of_model = (jobs.c.organization == index.organization, jobs.c.model_id == index.model_id, jobs.c.kind == JobKind.RAG_INDEX)
    query = select(jobs).where(*of_model, IS_ACTIVE, ~IS_REINDEX).order_by(jobs.c.job_id)
    return list((await connection.execute(query.with_for_update())).all())


async def _send_to(connection: AsyncConnection, row: Row[Any], spec: IndexSpec) -> None:
    """Have a job work for another index. Its worker, if it has one, loses the lease, and with it the right to write into the old one."""
    job = LockedJob(connection, row)
    job.set(spec=_INDEX.to_json(spec))
    if job.state is JobState.QUEUED:
        await job.write()
    else:
        await settlement.interrupt(connection, job, SWITCHED, None)


async def _take_over_documents(connection: AsyncConnection, index: IndexKey) -> None:
    """Describe the documents as the new index has them."""
    had = reindexed_documents.c
    same = (had.organization == documents.c.organization, had.model_id == documents.c.model_id, had.document_id == documents.c.document_id)
    failed = had.error != ""
    values = {
        "chunk_count": had.chunk_count,
        "state": case((failed, DocumentState.FAILED.value), else_=documents.c.state),
        "error": case((failed, had.error), else_=documents.c.error),
        "error_reason": case((failed, had.error_reason), else_=documents.c.error_reason),
    }
    found = (documents.c.state == DocumentState.INDEXED, *index.rows_of(reindexed_documents), *same)
    await connection.execute(update(documents).where(*found).values(values))
    await connection.execute(delete(reindexed_documents).where(*index.rows_of(reindexed_documents)))


def _lacking(index: IndexKey) -> tuple[ColumnElement[bool], ...]:
    had = reindexed_documents.c
    is_had = exists().where(
        *index.rows_of(reindexed_documents),
        had.document_id == documents.c.document_id,
        had.content_revision == documents.c.content_revision,
    )
    of_model = (documents.c.organization == index.organization, documents.c.model_id == index.model_id)
    return *of_model, documents.c.state == DocumentState.INDEXED, ~is_had


def _staged_from_row(row: Row[Any]) -> StagedDocument:
    form = DocumentFormat(row.format) if row.format else None
    content = DocumentContent(row.text, row.title, form, row.page_starts, HEADINGS.from_json(row.headings))
    return StagedDocument(row.document_id, row.title, revision=row.content_revision, content=content)
