"""An index is built beside the one that answers and takes its place whole: with what was added, changed and deleted meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg.rows import TupleRow

from server.db.database import PostgresDatabase
from server.db.index_removal import remove_idle_indexes
from server.db.queue import PostgresJobQueue
from server.domain.documents import DocumentReading, DocumentState, NewDocument
from server.domain.errors import ErrorData, FailedPrecondition, LeaseLost
from server.domain.ids import DOCUMENT, new_id
from server.domain.jobs import FailureReason, JobState
from server.domain.models import Model
from server.domain.orders import StagedDocument
from server.domain.rag_indexes import Calibration, EmbeddingSpace, IndexState, MeasuredSpace, RagIndex
from server.domain.retrieval import Chunking, RetrievalSettings, Search, SearchMode
from server.domain.specs import IndexSpec
from server.services.job_queue import ClaimLimits, Lease
from server.services.lexical.analysis import analyse_query
from tests.db.samples import (
    LIMITS,
    ORGANIZATION,
    RESULT,
    add_documents,
    add_job,
    add_model,
    change_state,
    claim,
    finish_job,
    make_chunks,
    make_job,
    make_rag_model,
    make_vectors,
    read_job,
    read_model,
    start_job,
)

TEXTS = ("alpha harbour", "beta harbour", "gamma harbour")
CHUNKING = Chunking(64, 8)
OLD, NEW = make_vectors(9, 8), make_vectors(9, 4, seed=5)
SPACE = EmbeddingSpace("other", "c" * 40, "MEAN", "", "", "NONE", 512, 4, "torch-float32")
MEASURED = MeasuredSpace(SPACE, Calibration(2, 0.1, 0.05, (0.0, 100.0), (0.0, 0.2)))


def _pack(vector: NDArray[numpy.float16]) -> bytes:
    return vector.tobytes()


@dataclass
class Shelf:
    """A READY model with three documents in its first index."""

    database: PostgresDatabase
    queue: PostgresJobQueue
    model: Model
    documents: list[str]

    async def begin(self) -> Lease:
        """Start the job that builds the next index."""
        async with self.database.transaction(ORGANIZATION) as transaction:
            number = await transaction.models.add_index(self.model.model_id, "other", CHUNKING)
            job = replace(make_job(self.model), spec=IndexSpec("other", CHUNKING, number, is_reindex=True))
            await transaction.jobs.insert(job)
        lease = (await claim(self.queue)).lease
        await self.queue.change_state(lease, JobState.RUNNING, "")
        return lease

    async def lacking(self, lease: Lease) -> list[StagedDocument]:
        return [document async for document in self.queue.read_pending_documents(lease)]

    async def commit(self, lease: Lease, document: StagedDocument, error: str = "") -> None:
        """Do what a child does with a document for the new index."""
        assert document.content is not None
        chunks = make_chunks([f"new {document.content.text}"])
        reading = DocumentReading(document.revision, error_reason="DOCUMENT_INVALID")
        vector = _pack(NEW[0])
        await self.queue.commit_document(lease, document.document_id, chunks, vector, 4, error, 9, reading, MEASURED)

    async def build(self, lease: Lease) -> list[StagedDocument]:
        lacking = await self.lacking(lease)
        for document in lacking:
            await self.commit(lease, document)
        return lacking

    async def end(self, lease: Lease) -> JobState:
        await self.queue.change_state(lease, JobState.FINALIZING, "")
        return await self.queue.complete(lease, RESULT)

    async def replace(self, document_id: str, text: str) -> None:
        """Change a document's content in the index that answers."""
        async with self.database.transaction(ORGANIZATION) as transaction:
            await transaction.staged.stage(self.model.model_id, document_id, NewDocument(text), "")
        await self.index_waiting()

    async def add(self, text: str) -> str:
        """Add a document to the index that answers."""
        document_id = new_id(DOCUMENT)
        async with self.database.transaction(ORGANIZATION) as transaction:
            await transaction.documents.insert(self.model.model_id, [(document_id, NewDocument(text))])
        await self.index_waiting()
        return document_id

    async def index_waiting(self) -> None:
        index = await self.read_index()
        spec = IndexSpec(index.embedding_model, index.chunking, index.index_number)
        lease = await start_job(self.database, self.queue, job=replace(make_job(self.model), spec=spec))
        for document in await self.lacking(lease):
            vector = _pack(OLD[0] if index.index_number == 1 else NEW[0])
            chunks = make_chunks([f"{'old' if index.index_number == 1 else 'new'} {document.text}"])
            reading = DocumentReading(document.revision)
            await self.queue.commit_document(lease, document.document_id, chunks, vector, len(vector) // 2, "", 1, reading)
        await finish_job(self.queue, lease)

    async def read_index(self) -> RagIndex:
        rag = (await read_model(self.database, self.model.model_id)).rag
        assert rag is not None
        assert rag.index is not None
        return rag.index

    async def find(self, mode: SearchMode = SearchMode.DENSE) -> list[str]:
        """Search in the index that answers; give the chunks' texts, sorted."""
        index = await self.read_index()
        settings = RetrievalSettings(top_k=50, similarity_threshold=-1, search_mode=mode)
        vector = OLD[0] if index.index_number == 1 else NEW[0]
        search = Search(settings, [float(number) for number in vector], analyse_query("harbour"), index.index_number)
        async with self.database.transaction(ORGANIZATION) as transaction:
            return sorted(hit.chunk.text for hit in await transaction.documents.search(self.model.model_id, search))


@pytest.fixture
async def shelf(database: PostgresDatabase, queue: PostgresJobQueue) -> Shelf:
    model = await add_model(database, make_rag_model())
    shelf = Shelf(database, queue, model, await add_documents(database, model, TEXTS))
    await shelf.index_waiting()
    return shelf


def _named(age: str, texts: Sequence[str] = TEXTS) -> list[str]:
    return sorted(f"{age} {text}" for text in texts)


async def test_the_old_index_answers_until_the_new_one_is_whole(shelf: Shelf) -> None:
    lease = await shelf.begin()
    lacking = await shelf.build(lease)
    assert sorted(document.content.text for document in lacking if document.content) == sorted(TEXTS)
    assert await shelf.lacking(lease) == []
    before = await read_model(shelf.database, shelf.model.model_id)
    assert await shelf.find() == await shelf.find(SearchMode.LEXICAL) == _named("old")
    assert await shelf.end(lease) is JobState.SUCCEEDED
    for mode in SearchMode:
        assert await shelf.find(mode) == _named("new")
    after = await read_model(shelf.database, shelf.model.model_id)
    assert before.rag is not None
    assert after.rag is not None
    assert (after.rag.embedding_model, after.rag.chunking) == ("other", CHUNKING)
    assert (after.rag.retrieval, after.rag.prompt_template) == (before.rag.retrieval, before.rag.prompt_template)
    assert (after.document_count, after.chunk_count) == (3, 3)
    index = await shelf.read_index()
    assert (index.index_number, index.state, index.space, index.dimension) == (2, IndexState.READY, SPACE, 4)
    assert index.calibration == MEASURED.calibration


async def test_what_changes_meanwhile_comes_in_another_round(shelf: Shelf) -> None:
    lease = await shelf.begin()
    await shelf.build(lease)
    added = await shelf.add("delta harbour")
    await shelf.replace(shelf.documents[1], "beta changed harbour")
    async with shelf.database.transaction(ORGANIZATION) as transaction:
        await transaction.documents.delete(shelf.model.model_id, shelf.documents[0])
    now = ["beta changed harbour", "delta harbour", "gamma harbour"]
    assert await shelf.end(lease) is JobState.QUEUED
    assert await shelf.find() == sorted([f"old {text}" for text in (now[0], now[1], TEXTS[2])])
    job = await read_job(shelf.database, lease.job_id)
    assert (job.attempt, job.state) == (2, JobState.QUEUED)
    again = (await claim(shelf.queue)).lease
    await shelf.queue.change_state(again, JobState.RUNNING, "")
    lacking = await shelf.build(again)
    assert {document.document_id for document in lacking} == {added, shelf.documents[1]}
    assert await shelf.end(again) is JobState.SUCCEEDED
    for mode in SearchMode:
        assert await shelf.find(mode) == _named("new", now)
    # And both kept their counts right.
    await remove_idle_indexes(shelf.database)
    assert await shelf.find(SearchMode.LEXICAL) == _named("new", now)


async def test_content_that_was_replaced_while_it_was_embedded_is_not_stored(shelf: Shelf) -> None:
    lease = await shelf.begin()
    (first, second, third) = await shelf.lacking(lease)
    await shelf.replace(first.document_id, "alpha changed harbour")
    async with shelf.database.transaction(ORGANIZATION) as transaction:
        await transaction.documents.delete(shelf.model.model_id, second.document_id)
    for document in (first, second, third):
        await shelf.commit(lease, document)
    assert (await read_job(shelf.database, lease.job_id)).progress.step == 3
    assert [document.document_id for document in await shelf.lacking(lease)] == [first.document_id]


async def test_a_job_that_adds_documents_at_the_switch_goes_on_in_the_new_index(shelf: Shelf) -> None:
    lease = await shelf.begin()
    await shelf.build(lease)
    await add_documents(shelf.database, shelf.model, ["epsilon harbour"])
    running = await start_job(shelf.database, shelf.queue, shelf.model)
    waiting = await add_job(shelf.database, shelf.model)
    assert await shelf.end(lease) is JobState.SUCCEEDED
    with pytest.raises(LeaseLost):
        await shelf.queue.change_state(running, JobState.FINALIZING, "")
    for job_id in (running.job_id, waiting.job_id):
        job = await read_job(shelf.database, job_id)
        assert (job.state, job.spec) == (JobState.QUEUED, IndexSpec("other", CHUNKING, 2))
    await shelf.index_waiting()
    assert await shelf.find() == _named("new", [*TEXTS, "epsilon harbour"])


async def test_a_job_that_is_being_cancelled_at_the_switch_ends_so(shelf: Shelf) -> None:
    lease = await shelf.begin()
    await shelf.build(lease)
    running = await start_job(shelf.database, shelf.queue, shelf.model)
    await change_state(shelf.database, running.job_id, JobState.CANCELLING)
    assert await shelf.end(lease) is JobState.SUCCEEDED
    assert (await read_job(shelf.database, running.job_id)).state is JobState.CANCELLED


async def test_a_document_that_the_new_index_refuses_says_so_once_it_answers(shelf: Shelf) -> None:
    lease = await shelf.begin()
    first, *others = await shelf.lacking(lease)
    await shelf.commit(lease, first, "It is too long.")
    for document in others:
        await shelf.commit(lease, document)
    async with shelf.database.transaction(ORGANIZATION) as transaction:
        assert (await transaction.documents.get(shelf.model.model_id, first.document_id)).state is DocumentState.INDEXED
    assert await shelf.end(lease) is JobState.SUCCEEDED
    async with shelf.database.transaction(ORGANIZATION) as transaction:
        failed = await transaction.documents.get(shelf.model.model_id, first.document_id)
    assert (failed.state, failed.error, failed.chunk_count) == (DocumentState.FAILED, "It is too long.", 0)
    assert await shelf.find() == _named("new", [document.content.text for document in others if document.content])


async def _count(sql: psycopg.Connection[TupleRow], number: int) -> list[int]:
    tables = ("chunks", "chunk_vectors", "chunk_terms", "term_counts", "reindexed_documents", "rag_indexes")
    return [sql.execute(f"SELECT count(*) FROM {table} WHERE index_number = %s", (number,)).fetchall()[0][0] for table in tables]  # noqa: S608


@pytest.mark.parametrize("ending", ["succeeds", "fails", "is cancelled"])
async def test_only_the_index_that_answers_stays(shelf: Shelf, sql: psycopg.Connection[TupleRow], ending: str) -> None:
    lease = await shelf.begin()
    await shelf.build(lease)
    assert await remove_idle_indexes(shelf.database) == []
    if ending == "succeeds":
        await shelf.end(lease)
    elif ending == "fails":
        await shelf.queue.fail(lease, FailureReason.DISK_FULL, ErrorData("ABORTED", "DISK_FULL", "The disk is full."))
    else:
        await change_state(shelf.database, lease.job_id, JobState.CANCELLING)
        assert await shelf.end(lease) is JobState.CANCELLING
        assert await remove_idle_indexes(shelf.database) == []
        await shelf.queue.interrupt(lease, "stopped", None)
    gone, stays, age = (1, 2, "new") if ending == "succeeds" else (2, 1, "old")
    assert [index.index_number for index in await remove_idle_indexes(shelf.database)] == [gone]
    assert await _count(sql, gone) == [0] * 6
    assert await _count(sql, stays) == [3, 3, 3, (await _count(sql, stays))[3], 0, 1]
    for mode in SearchMode:
        assert await shelf.find(mode) == _named(age)


async def test_an_index_in_the_making_survives_an_attempt_that_crashes(shelf: Shelf) -> None:
    lease = await shelf.begin()
    first, *others = await shelf.lacking(lease)
    await shelf.commit(lease, first)
    await shelf.queue.interrupt(lease, "killed", 5)
    assert await remove_idle_indexes(shelf.database) == []
    again = (await claim(shelf.queue)).lease
    assert [document.document_id for document in await shelf.lacking(again)] == [document.document_id for document in others]


async def test_vectors_of_another_space_are_refused(shelf: Shelf) -> None:
    lease = await shelf.begin()
    first, second, _ = await shelf.lacking(lease)
    await shelf.commit(lease, first)
    other = MeasuredSpace(replace(SPACE, revision="d" * 40))
    with pytest.raises(FailedPrecondition) as refused:
        await shelf.queue.commit_document(
            lease, second.document_id, make_chunks(["x"]), _pack(NEW[0]), 4, "", 3, DocumentReading(second.revision), other
        )
    assert refused.value.reason == "EMBEDDING_SPACE_CHANGED"
    assert second.document_id in {document.document_id for document in await shelf.lacking(lease)}


async def test_an_index_of_before_spaces_were_kept_takes_the_first_of_its_dimension(shelf: Shelf) -> None:
    await add_documents(shelf.database, shelf.model, ["delta", "epsilon"])
    lease = await start_job(shelf.database, shelf.queue, shelf.model)
    first, second = await shelf.lacking(lease)
    fitting, other = replace(SPACE, dimension=8), replace(SPACE, dimension=8, pooling="CLS")

    async def commit(document: StagedDocument, space: EmbeddingSpace, vector: bytes) -> None:
        reading = DocumentReading(document.revision)
        await shelf.queue.commit_document(
            lease, document.document_id, make_chunks(["x"]), vector, space.dimension, "", 2, reading, MeasuredSpace(space)
        )

    with pytest.raises(FailedPrecondition, match="8 numbers"):
        await commit(first, SPACE, _pack(NEW[0]))
    await commit(first, fitting, _pack(OLD[0]))
    with pytest.raises(FailedPrecondition, match="other vectors"):
        await commit(second, other, _pack(OLD[0]))
    assert (await shelf.read_index()).space == fitting


async def test_building_an_index_takes_no_room_from_documents_that_are_added(shelf: Shelf) -> None:
    one = ClaimLimits(training_jobs=0, index_jobs=1, batch_jobs=0)
    await shelf.begin()
    second = replace(make_job(shelf.model), spec=IndexSpec("other", CHUNKING, 3, is_reindex=True))
    await add_job(shelf.database, job=second)
    added = await add_job(shelf.database, shelf.model)
    claimed = await shelf.queue.claim("worker", one, 30)
    assert claimed is not None
    assert claimed.job.job_id == added.job_id
    assert await shelf.queue.claim("worker", one, 30) is None
    assert await shelf.queue.claim("worker", LIMITS, 30) is not None


async def test_the_next_claim_tells_that_the_space_was_calibrated(shelf: Shelf) -> None:
    lease = await shelf.begin()
    await shelf.build(lease)
    await shelf.queue.interrupt(lease, "killed", 5)
    assert (await claim(shelf.queue)).calibrated_fingerprint == SPACE.fingerprint
