"""Contents that wait beside what is found: settled by a job, for the revision that it read, chunk by chunk what has changed."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from server.db.database import PostgresDatabase
from server.db.document_commits import ChunksChanged
from server.db.queue import PostgresJobQueue
from server.domain.documents import (
    Document,
    DocumentContent,
    DocumentFile,
    DocumentFormat,
    DocumentHeading,
    DocumentReading,
    DocumentState,
    DocumentWarning,
    NewDocument,
)
from server.domain.events import IndexAdvanced, IndexProgress
from server.domain.jobs import IndexCounters
from server.domain.models import Model
from server.domain.orders import StagedDocument
from server.domain.retrieval import Chunk, RetrievalSettings, RetrievedChunk, Search
from server.services.job_queue import Lease
from tests.db.samples import (
    ORGANIZATION,
    add_documents,
    add_model,
    make_chunks,
    make_rag_model,
    make_vectors,
    read_job,
    read_log,
    start_job,
)

VECTORS = make_vectors(3)
FILE = DocumentFile("default/documents/m/one", 300, "f" * 64)
CONTENT = DocumentContent(
    "Chapter\nOne. Two.",
    "Its title",
    DocumentFormat.PDF,
    [0, 13],
    [DocumentHeading(("Chapter",), 0)],
    [DocumentWarning("GARBLED_TEXT", "g")],
)


class Shelf:
    """A model with one document, and the job that indexes it."""

    def __init__(self, database: PostgresDatabase, queue: PostgresJobQueue, model: Model, document_id: str, lease: Lease) -> None:
        self.database, self.queue, self.model, self.document_id, self.lease = database, queue, model, document_id, lease

    async def commit(
        self, chunks: Sequence[Chunk], vectors: bytes, reading: DocumentReading | None = None, error: str = ""
    ) -> Sequence[str]:
        return await self.queue.commit_document(
            self.lease, self.document_id, chunks, vectors, 8, error, 1, reading or DocumentReading(revision=1)
        )

    async def stage(self, new: NewDocument) -> str:
        async with self.database.transaction(ORGANIZATION) as transaction:
            return await transaction.staged.stage(self.model.model_id, self.document_id, new, "job_2")

    async def read(self) -> Document:
        async with self.database.transaction(ORGANIZATION) as transaction:
            return await transaction.documents.get(self.model.model_id, self.document_id)

    async def waiting(self) -> list[StagedDocument]:
        return [document async for document in self.queue.read_pending_documents(self.lease)]

    async def search(self) -> list[RetrievedChunk]:
        settings = RetrievalSettings(top_k=9, similarity_threshold=-1)
        async with self.database.transaction(ORGANIZATION) as transaction:
            search = Search(settings, [float(number) for number in VECTORS[0]])
            return sorted(await transaction.documents.search(self.model.model_id, search), key=lambda hit: hit.chunk.position)


@pytest.fixture
async def shelf(database: PostgresDatabase, queue: PostgresJobQueue) -> Shelf:
    model = await add_model(database, make_rag_model())
    (document_id,) = await add_documents(database, model, ["a b"])
    return Shelf(database, queue, model, document_id, await start_job(database, queue, model))


async def test_the_content_before_is_found_until_the_new_one_is_committed(shelf: Shelf) -> None:
    await shelf.commit(make_chunks(["old"]), VECTORS[:1].tobytes())
    await shelf.stage(NewDocument(title="New", metadata={"year": 2}, file=FILE))
    before = await shelf.read()
    assert (before.state, before.update_pending, before.title) == (DocumentState.INDEXED, True, "Title of a b")
    assert [hit.chunk.text for hit in await shelf.search()] == ["old"]
    (waiting,) = await shelf.waiting()
    assert (waiting.revision, waiting.path, waiting.text) == (2, FILE.path, "")
    assert waiting.known_chunks == (make_chunks(["old"])[0].content_hash,)
    assert await shelf.commit(make_chunks(["new"]), VECTORS[1:2].tobytes(), DocumentReading(2, CONTENT)) == []
    after = await shelf.read()
    assert (after.state, after.update_pending, after.title, after.metadata) == (DocumentState.INDEXED, False, "New", {"year": 2})
    assert (after.format, after.page_count, after.warnings) == (DocumentFormat.PDF, 2, CONTENT.warnings)
    assert (after.size_characters, after.original_size_bytes, after.original_sha256) == (len(CONTENT.text), 300, FILE.sha256)
    assert [hit.chunk.text for hit in await shelf.search()] == ["new"]
    assert await shelf.waiting() == []
    async with shelf.database.transaction(ORGANIZATION) as transaction:
        assert await transaction.documents.get_text(shelf.model.model_id, shelf.document_id) == CONTENT.text


async def test_a_chunk_over_two_pages_tells_where_the_second_begins(shelf: Shelf) -> None:
    (whole, first) = make_chunks([CONTENT.text, "One."])
    chunks = [replace(whole, char_end=len(CONTENT.text), page=1), replace(first, position=1, char_start=8, char_end=12, page=1)]
    await shelf.stage(NewDocument(title="New", file=FILE))
    await shelf.commit(chunks, VECTORS[:2].tobytes(), DocumentReading(2, CONTENT))
    assert [list(hit.page_breaks) for hit in await shelf.search()] == [[13], []]


async def test_unchanged_chunks_keep_their_ids_and_vectors(shelf: Shelf) -> None:
    old = [replace(chunk, heading_path=("A", "B")) for chunk in make_chunks(["one", "two", "one"])]
    await shelf.commit(old, VECTORS.tobytes())
    before = {hit.chunk.position: hit for hit in await shelf.search()}
    await shelf.stage(NewDocument("changed"))
    new = [replace(chunk, heading_path=("A", "B")) for chunk in make_chunks(["zero", "one", "two"])]
    await shelf.commit(new, VECTORS[2:].tobytes(), DocumentReading(2, reused=[1, 2]))
    after = await shelf.search()
    assert [hit.chunk.text for hit in after] == ["zero", "one", "two"]
    assert [hit.chunk.chunk_id for hit in after] == [new[0].chunk_id, old[0].chunk_id, old[1].chunk_id]
    assert [hit.scores.similarity for hit in after[1:]] == [before[0].scores.similarity, before[1].scores.similarity]
    assert after[0].scores.similarity == before[2].scores.similarity
    assert after[1].chunk.heading_path == ("A", "B")


async def test_vectors_that_are_gone_cannot_be_reused(shelf: Shelf) -> None:
    await shelf.commit(make_chunks(["old"]), VECTORS[:1].tobytes())
    await shelf.stage(NewDocument("changed"))
    with pytest.raises(ChunksChanged):
        await shelf.commit(make_chunks(["other"]), b"", DocumentReading(2, reused=[0]))
    assert [hit.chunk.text for hit in await shelf.search()] == ["old"]


async def test_a_content_that_cannot_be_indexed_leaves_the_one_before_and_says_why(shelf: Shelf) -> None:
    await shelf.commit(make_chunks(["old"]), VECTORS[:1].tobytes())
    await shelf.stage(NewDocument(file=FILE))
    reading = DocumentReading(2, error_reason="DOCUMENT_ENCRYPTED")
    assert await shelf.commit([], b"", reading, "It is encrypted.") == [FILE.path]
    document = await shelf.read()
    assert (document.state, document.error, document.error_reason) == (DocumentState.INDEXED, "It is encrypted.", "DOCUMENT_ENCRYPTED")
    assert (document.chunk_count, document.update_pending) == (1, False)
    assert [hit.chunk.text for hit in await shelf.search()] == ["old"]
    await shelf.stage(NewDocument("better"))
    assert ((await shelf.read()).error, (await shelf.read()).update_pending) == ("", True)


async def test_a_first_content_that_failed_waits_again_when_it_is_given_again(shelf: Shelf) -> None:
    await shelf.commit([], b"", DocumentReading(1), "It is empty.")
    assert (await shelf.read()).state is DocumentState.FAILED
    await shelf.stage(NewDocument("more"))
    assert (await shelf.read()).state is DocumentState.PENDING


async def test_a_job_commits_only_the_content_that_it_read(shelf: Shelf) -> None:
    assert await shelf.stage(NewDocument(file=FILE)) == ""
    assert await shelf.stage(NewDocument("third")) == FILE.path
    await shelf.commit(make_chunks(["second"]), VECTORS[:1].tobytes(), DocumentReading(2))
    assert (await shelf.read()).state is DocumentState.PENDING
    assert [document.revision for document in await shelf.waiting()] == [3]
    log = await read_log(shelf.database, shelf.lease.job_id)
    assert [event.payload.error[:13] for event in log if isinstance(event.payload, IndexProgress)] == ["Newer content"]


async def test_saying_the_same_twice_changes_and_counts_nothing(shelf: Shelf) -> None:
    for _ in range(2):
        await shelf.commit(make_chunks(["a"]), VECTORS[:1].tobytes())
    log = await read_log(shelf.database, shelf.lease.job_id)
    assert [event.payload.documents_done for event in log if isinstance(event.payload, IndexProgress)] == [1]


async def test_the_file_of_replaced_content_is_given_to_be_removed(shelf: Shelf) -> None:
    await shelf.stage(NewDocument(file=FILE))
    assert FILE.path in await shelf.queue.list_live_directories()
    await shelf.commit(make_chunks(["a"]), VECTORS[:1].tobytes(), DocumentReading(2, CONTENT))
    await shelf.stage(NewDocument(file=replace(FILE, path="default/documents/m/two")))
    assert {FILE.path, "default/documents/m/two"} <= set(await shelf.queue.list_live_directories())
    assert await shelf.commit(make_chunks(["b"]), VECTORS[:1].tobytes(), DocumentReading(3, CONTENT)) == [FILE.path]
    async with shelf.database.transaction(ORGANIZATION) as transaction:
        assert await transaction.documents.delete(shelf.model.model_id, shelf.document_id) == ["default/documents/m/two"]


async def test_counters_say_what_is_committed_and_a_new_attempt_begins_there(shelf: Shelf) -> None:
    far = IndexCounters(parsed_documents=4, chunked_chunks=9, embedded_chunks=8, reused_chunks=1)
    await shelf.queue.append(shelf.lease, [IndexAdvanced(far)])
    await shelf.commit(make_chunks(["a", "b"]), VECTORS[:2].tobytes(), DocumentReading(1, counters=far))
    progress = (await read_job(shelf.database, shelf.lease.job_id)).progress
    assert progress.indexing == replace(far, committed_documents=1, committed_chunks=2)
    await shelf.queue.append(shelf.lease, [IndexAdvanced(replace(far, parsed_documents=5))])
    again = (await read_job(shelf.database, shelf.lease.job_id)).progress.indexing
    assert again == replace(far, parsed_documents=5, committed_documents=1, committed_chunks=2)
    assert again.begin_attempt() == IndexCounters(1, 2, 2, 0, 1, 2, 0)
