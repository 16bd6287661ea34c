"""Rows of documents, and the exact search over their vectors."""

import hashlib

import numpy
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg.rows import TupleRow

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.documents import DocumentState, NewDocument
from server.domain.errors import FailedPrecondition, InvalidInput, NotFound
from server.domain.ids import DOCUMENT, MODEL, new_id
from server.domain.models import Model
from server.domain.retrieval import RetrievalSettings, RetrievedChunk, Search
from server.services.job_queue import Lease
from server.services.ports import Page
from tests.db.samples import ORGANIZATION, add_documents, add_model, make_chunks, make_rag_model, make_vectors, read_model, start_job

Vectors = NDArray[numpy.float16]


async def _search(database: PostgresDatabase, model: Model, vector: Vectors, top_k: int, least: float) -> list[RetrievedChunk]:
    async with database.transaction(ORGANIZATION) as transaction:
        settings = RetrievalSettings(top_k=top_k, similarity_threshold=least)
        return list(await transaction.documents.search(model.model_id, Search(settings, [float(number) for number in vector])))


async def _index(
    database: PostgresDatabase, queue: PostgresJobQueue, vectors: Vectors, per_document: int
) -> tuple[Model, Lease, list[str]]:
    """Index vectors [documents * per_document, dimension] as documents of a new model."""
    model = await add_model(database, make_rag_model())
    count = len(vectors) // per_document
    documents = await add_documents(database, model, [f"text {number}" for number in range(count)])
    lease = await start_job(database, queue, model)
    for place, document_id in enumerate(documents):
        mine = vectors[place * per_document : (place + 1) * per_document]
        chunks = make_chunks([f"chunk {place}.{number}" for number in range(per_document)])
        await queue.commit_document(lease, document_id, chunks, mine.tobytes(), vectors.shape[1], "", count)
    return model, lease, documents


async def test_a_document_comes_back_as_it_was_given(database: PostgresDatabase) -> None:
    model = await add_model(database, make_rag_model())
    new = NewDocument("نص the text", "عنوان", "https://example.org/a", {"year": 2024, "draft": False, "ratio": 0.5, "by": "Ann"})
    async with database.transaction(ORGANIZATION) as transaction:
        (added,) = await transaction.documents.insert(model.model_id, [(new_id(DOCUMENT), new)])
        assert await transaction.documents.get(model.model_id, added.document_id) == added
    assert (added.title, added.source_uri, added.metadata) == (new.title, new.source_uri, new.metadata)
    assert (added.size_characters, added.size_bytes) == (11, len(new.text.encode()))
    assert added.content_sha256 == hashlib.sha256(new.text.encode()).hexdigest()
    assert (added.state, added.chunk_count) == (DocumentState.PENDING, 0)


async def test_documents_are_listed_newest_first_by_state(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model, _, indexed = await _index(database, queue, make_vectors(2), 1)
    pending = await add_documents(database, model, ["later"])
    async with database.transaction(ORGANIZATION) as transaction:

        async def find(page: Page, state: DocumentState | None = None) -> list[str]:
            return [document.document_id for document in await transaction.documents.list(model.model_id, page, state)]

        newest_first = sorted(indexed + pending, reverse=True)
        assert await find(Page(2)) == newest_first[:2]
        assert await find(Page(2, newest_first[1])) == newest_first[2:]
        assert await find(Page(9), DocumentState.PENDING) == pending
        assert set(await find(Page(9), DocumentState.INDEXED)) == set(indexed)


async def test_documents_of_an_unknown_model_are_not_found(database: PostgresDatabase) -> None:
    for model_id in (new_id(MODEL), "nothing"):
        with pytest.raises(NotFound):
            async with database.transaction(ORGANIZATION) as transaction:
                await transaction.documents.insert(model_id, [(new_id(DOCUMENT), NewDocument("text"))])


async def test_search_gives_what_an_exact_comparison_gives(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    vectors = make_vectors(120, 24, seed=1)
    model, _, documents = await _index(database, queue, vectors, 6)
    query = make_vectors(1, 24, seed=2)[0]
    stored, asked = vectors.astype(numpy.float64), query.astype(numpy.float64)
    similarities = stored @ asked / numpy.linalg.norm(stored, axis=1) / numpy.linalg.norm(asked)
    best = numpy.argsort(-similarities)[:10]
    found = await _search(database, model, query, 10, -1.0)
    assert [(hit.document_id, hit.chunk.position) for hit in found] == [(documents[place // 6], place % 6) for place in best]
    assert [hit.scores.similarity for hit in found] == pytest.approx([similarities[place] for place in best], abs=1e-5)
    threshold = float(similarities[best[3]]) - 1e-4
    assert len(await _search(database, model, query, 10, threshold)) == 4
    assert await _search(database, model, query, 10, 1.01) == []


async def test_a_hit_carries_its_chunk_title_and_metadata(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    vectors = make_vectors(3)
    model, _, documents = await _index(database, queue, vectors, 1)
    (hit,) = await _search(database, model, vectors[1], 1, 0.9)
    assert (hit.document_id, hit.title, hit.metadata) == (documents[1], "Title of text 1", {"place": 1})
    assert (hit.chunk.text, hit.chunk.char_start, hit.chunk.char_end, hit.chunk.page) == ("chunk 1.0", 0, 9, 1)
    assert hit.scores.similarity == pytest.approx(1.0, abs=1e-3)


async def test_another_models_chunks_are_not_found(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    vectors = make_vectors(4)
    await _index(database, queue, vectors, 1)
    model = await add_model(database, make_rag_model())
    assert await _search(database, model, vectors[0], 5, -1.0) == []


async def test_only_indexed_documents_are_found(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    vectors = make_vectors(2)
    model, lease, documents = await _index(database, queue, vectors, 1)
    (failed,) = await add_documents(database, model, ["unreadable"])
    await queue.commit_document(lease, failed, make_chunks(["x"]), vectors[:1].tobytes(), 8, "It has no text.", 3)
    assert {hit.document_id for hit in await _search(database, model, vectors[0], 9, -1.0)} == set(documents)
    async with database.transaction(ORGANIZATION) as transaction:
        document = await transaction.documents.get(model.model_id, failed)
    assert (document.state, document.error, document.chunk_count) == (DocumentState.FAILED, "It has no text.", 0)


async def test_a_document_that_is_to_be_indexed_again_is_found_as_it_was_meanwhile(
    database: PostgresDatabase, queue: PostgresJobQueue, sql: psycopg.Connection[TupleRow]
) -> None:
    vectors = make_vectors(2)
    model, _, documents = await _index(database, queue, vectors, 1)
    sql.execute("UPDATE documents SET state = 'PENDING' WHERE document_id = %s", (documents[0],))
    assert [hit.document_id for hit in await _search(database, model, vectors[0], 9, -1.0)] == documents


async def test_a_deleted_document_is_found_no_more(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    vectors = make_vectors(2)
    model, _, documents = await _index(database, queue, vectors, 1)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.documents.delete(model.model_id, documents[0])
    assert [hit.document_id for hit in await _search(database, model, vectors[0], 9, -1.0)] == [documents[1]]
    assert (await read_model(database, model.model_id)).chunk_count == 1
    async with database.transaction(ORGANIZATION) as transaction:
        with pytest.raises(NotFound):
            await transaction.documents.delete(model.model_id, documents[0])


async def test_committing_a_document_again_replaces_its_chunks(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    vectors = make_vectors(4)
    model, lease, (document_id,) = await _index(database, queue, vectors[:3], 3)
    await queue.commit_document(lease, document_id, make_chunks(["new"]), vectors[3:].tobytes(), 8, "", 1)
    assert [hit.chunk.text for hit in await _search(database, model, vectors[0], 9, -1.0)] == ["new"]


async def test_vectors_of_another_dimension_are_refused(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model, lease, _ = await _index(database, queue, make_vectors(1), 1)
    (other,) = await add_documents(database, model, ["other"])
    with pytest.raises(FailedPrecondition, match="8 numbers"):
        await queue.commit_document(lease, other, make_chunks(["x"]), make_vectors(1, 4).tobytes(), 4, "", 2)
    with pytest.raises(FailedPrecondition, match="4 numbers"):
        await _search(database, model, make_vectors(1, 4)[0], 5, 0.0)
    stored = await read_model(database, model.model_id)
    assert stored.rag is not None
    assert stored.rag.index is not None
    assert stored.rag.index.dimension == 8


async def test_bytes_that_are_not_the_vectors_are_refused(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model, lease, _ = await _index(database, queue, make_vectors(1), 1)
    (other,) = await add_documents(database, model, ["other"])
    with pytest.raises(InvalidInput):
        await queue.commit_document(lease, other, make_chunks(["x"]), make_vectors(1).tobytes()[:-1], 8, "", 2)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
async def test_a_query_that_is_no_vector_is_refused(database: PostgresDatabase, queue: PostgresJobQueue, number: float) -> None:
    model, _, _ = await _index(database, queue, make_vectors(1), 1)
    with pytest.raises(InvalidInput):
        async with database.transaction(ORGANIZATION) as transaction:
            await transaction.documents.search(model.model_id, Search(RetrievalSettings(), [number] * 8))


async def test_a_query_of_zeros_finds_nothing(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model, _, _ = await _index(database, queue, make_vectors(3), 1)
    assert await _search(database, model, numpy.zeros(8, numpy.float16), 5, -1.0) == []


async def test_vectors_of_any_length_are_stored(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    for dimension in (1, 1024, 4096):
        vectors = make_vectors(2, dimension)
        model, _, _ = await _index(database, queue, vectors, 1)
        assert len(await _search(database, model, vectors[0], 5, 0.99)) >= 1
