"""Searching as a use case: which legs run, what a model's settings and a request's make together, what is refused."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from server.db.database import PostgresDatabase
from server.db.vector_placement import PostgresVectorTables
from server.domain.documents import NewDocument
from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable
from server.domain.generation import ChatMessage, EmbedRole, Role
from server.domain.models import Model, ModelState, RagConfiguration
from server.domain.rag_indexes import Calibration, EmbeddingSpace, IndexState, RagIndex
from server.domain.retrieval import Chunking, MetadataCondition, Rerank, RetrievalOverrides, RetrievalSettings, SearchMode
from server.inference.client import EngineClient
from server.services.followups import make_self_standing
from server.services.rag_models import default_retrieval, find_warnings, merge_retrieval
from server.services.requests import Retrieve
from server.services.retrieval import Retrieval, resolve_threshold
from tests.db.samples import ORGANIZATION, add_model, make_rag_model, read_model
from tests.services.libraries import index_documents

TEXTS = ("منارة أورفال تضيء الميناء منذ ١٨٨٤.", "The lighthouse of Orvale lights the harbour.")


@dataclass(frozen=True)
class Library:
    """The use cases over a model with two documents. Its engine does not run: whatever needs an embedding fails."""

    retrieval: Retrieval
    model: Model
    database: PostgresDatabase

    async def find(self, query: str, **asked: object) -> list[str]:
        """Search by words; give the texts found."""
        overrides = RetrievalOverrides(**{"search_mode": SearchMode.LEXICAL, **asked})  # type: ignore[arg-type]  # plain test data
        found = await self.retrieval.retrieve(ORGANIZATION, Retrieve(self.model.model_id, query, overrides))
        return [hit.chunk.text for hit in found.chunks]


@pytest.fixture
async def library(database: PostgresDatabase, tmp_path: Path) -> AsyncIterator[Library]:
    model = await add_model(database, make_rag_model())
    await index_documents(
        database, model, [NewDocument(text, metadata={"lang": lang}) for text, lang in zip(TEXTS, ("ar", "en"), strict=True)]
    )
    engine = EngineClient(tmp_path / "no-engine.sock")
    yield Library(Retrieval(database, engine), model, database)
    await engine.close()


async def test_words_are_searched_without_an_embedding_model(library: Library) -> None:
    assert await library.find("متى أضاءت المناره الميناء") == [TEXTS[0]]
    assert await library.find("HARBOURS") == [TEXTS[1]]
    for mode in (SearchMode.DENSE, SearchMode.HYBRID):
        with pytest.raises(Unavailable):
            await library.find("harbour", search_mode=mode)


async def test_a_search_takes_one_statement(library: Library) -> None:
    await library.find("harbour")
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        assert await library.find("harbour") == [TEXTS[1]]
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(statements) == 1


async def test_a_change_of_the_model_is_seen_by_the_very_next_search(library: Library) -> None:
    assert len(await library.find("lighthouse harbour منارة")) == 2
    stored = await read_model(library.database, library.model.model_id)
    assert stored.rag is not None
    changed = replace(stored.rag, retrieval=replace(stored.rag.retrieval, top_k=1))
    async with library.database.transaction(ORGANIZATION) as transaction:
        await transaction.models.save(replace(stored, rag=changed))
    assert len(await library.find("lighthouse harbour منارة")) == 1
    async with library.database.transaction(ORGANIZATION) as transaction:
        await transaction.models.save(replace(stored, state=ModelState.FAILED))
    with pytest.raises(FailedPrecondition, match="not READY"):
        await library.find("lighthouse")
    async with library.database.begin() as connection:
        await connection.exec_driver_sql("DELETE FROM jobs")
    async with library.database.transaction(ORGANIZATION) as transaction:
        await transaction.models.delete(library.model.model_id)
    with pytest.raises(NotFound):
        await library.find("lighthouse")


async def test_vectors_that_move_to_a_table_of_their_own_are_found_by_the_very_next_search(library: Library) -> None:
    assert await library.find("harbour") == [TEXTS[1]]
    assert len(await PostgresVectorTables(library.database, indexed_from_chunks=1).tend()) == 2
    rag = await library.retrieval.read_configuration(ORGANIZATION, library.model.model_id)
    vector, query = [1.0] * 8, make_self_standing("harbour", ())
    settings = RetrievalSettings(5, -1.0)
    assert len((await library.retrieval.search(ORGANIZATION, library.model.model_id, query, rag, settings, vector)).chunks) == 2
    assert await library.find("harbour") == [TEXTS[1]]
    before = replace(rag, index=replace(rag.index, vector_table=None, place_revision="1.1") if rag.index else None)
    assert len((await library.retrieval.search(ORGANIZATION, library.model.model_id, query, before, settings, vector)).chunks) == 2


async def test_a_filter_narrows_the_search(library: Library) -> None:
    assert await library.find("lighthouse", filter=(MetadataCondition("lang", equals="en"),)) == [TEXTS[1]]
    assert await library.find("lighthouse", filter=(MetadataCondition("lang", equals="ar"),)) == []
    assert await library.find("lighthouse", filter=(MetadataCondition("year", exists=True),)) == []


async def test_a_filter_on_a_key_that_no_document_has_is_refused_by_name(library: Library) -> None:
    where = (MetadataCondition("lang", exists=True), MetadataCondition("Lang", equals="en"))
    with pytest.raises(InvalidInput, match=r"retrieval\.filter\.conditions\[1\]\.key: no document of this model has 'Lang'"):
        await library.find("lighthouse", filter=where)


async def test_a_question_that_leans_on_an_earlier_one_is_found_by_its_words(library: Library) -> None:
    turns = (ChatMessage(Role.USER, "Where is the lighthouse?"), ChatMessage(Role.ASSISTANT, "In Orvale."))
    lexical = RetrievalOverrides(search_mode=SearchMode.LEXICAL)
    alone = await library.retrieval.retrieve(ORGANIZATION, Retrieve(library.model.model_id, "When was it built?", lexical))
    led = await library.retrieval.retrieve(ORGANIZATION, Retrieve(library.model.model_id, "When was it built?", lexical, turns))
    assert ([hit.chunk.text for hit in alone.chunks], alone.searched_query) == ([], "When was it built?")
    assert ([hit.chunk.text for hit in led.chunks], led.searched_query) == ([TEXTS[1]], "lighthouse When was it built?")
    arabic = (ChatMessage(Role.USER, "ماذا تضيء منارة أورفال؟"), ChatMessage(Role.ASSISTANT, "الميناء."))
    led = await library.retrieval.retrieve(ORGANIZATION, Retrieve(library.model.model_id, "ومنذ متى؟", lexical, arabic))
    assert [hit.chunk.text for hit in led.chunks] == [TEXTS[0]]


async def test_a_conversation_before_a_search_is_checked(library: Library) -> None:
    system = (ChatMessage(Role.USER, "a"), ChatMessage(Role.USER, ""))
    with pytest.raises(InvalidInput, match=r"messages\[1\]\.content"):
        await library.retrieval.retrieve(ORGANIZATION, Retrieve(library.model.model_id, "q", RetrievalOverrides(), system))
    many = tuple(ChatMessage(Role.USER if place % 2 == 0 else Role.ASSISTANT, "x") for place in range(1_000))
    with pytest.raises(InvalidInput, match=r"messages: must be at most 1000, not 1001"):
        await library.retrieval.retrieve(ORGANIZATION, Retrieve(library.model.model_id, "q", RetrievalOverrides(), many))


async def test_weights_that_search_nothing_are_refused(library: Library) -> None:
    with pytest.raises(InvalidInput, match="nothing would be searched"):
        await library.find("lighthouse", search_mode=SearchMode.HYBRID, dense_weight=0.0, lexical_weight=0.0)


def test_a_request_overrides_what_it_sets() -> None:
    where = (MetadataCondition("lang", equals="en"),)
    settings = RetrievalSettings(5, 0.3, SearchMode.HYBRID, 100, 2.0, 3.0, where)
    assert merge_retrieval(settings, RetrievalOverrides()) == settings
    changed = RetrievalOverrides(7, -1.0, SearchMode.DENSE, 200, 0.0, 0.5, (MetadataCondition("year", exists=True),), Rerank("m"), 3, 0.4)
    assert merge_retrieval(settings, changed) == RetrievalSettings(
        7, -1.0, SearchMode.DENSE, 200, 0.0, 0.5, changed.filter or (), Rerank("m"), 3, 0.4
    )


@pytest.mark.parametrize(
    ("embedding_model", "mode"),
    [
        ("aubmindlab/bert-base-arabertv02", SearchMode.HYBRID),
        ("CAMeL-Lab/bert-base-arabic-camelbert-mix", SearchMode.HYBRID),
        ("BAAI/bge-m3", SearchMode.DENSE),
        ("someone/unknown", SearchMode.DENSE),
    ],
)
def test_what_was_never_trained_to_retrieve_also_searches_by_words(embedding_model: str, mode: SearchMode) -> None:
    assert default_retrieval(embedding_model).search_mode is mode
    assert [warning.code for warning in find_warnings(embedding_model)] == ["EMBEDDING_MODEL_NOT_TUNED"] * (mode is SearchMode.HYBRID)
    asked = RetrievalOverrides(search_mode=SearchMode.LEXICAL)
    assert merge_retrieval(default_retrieval(embedding_model), asked).search_mode is SearchMode.LEXICAL


SPACE = EmbeddingSpace("all-MiniLM", "c" * 40, "MEAN", "", "", "NONE", 256, 8, "torch-float32")


class _OneVectorEngine:
    """Embeds every text to the same vector of one space."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    async def embed(self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend) -> Embeddings:
        return Embeddings([[1.0] + [0.0] * 7 for _ in texts], 8, [1 for _ in texts], 256, self._fingerprint)


def _configure(space: EmbeddingSpace | None, calibration: Calibration | None = None) -> RagConfiguration:
    rag = make_rag_model().rag
    assert rag is not None
    now = datetime.now(UTC)
    return replace(rag, index=RagIndex(1, "all-MiniLM", Chunking(), IndexState.READY, now, 1, 8, space=space, calibration=calibration))


async def test_a_query_is_embedded_in_the_space_of_the_index_or_refused(database: PostgresDatabase) -> None:
    retrieval = Retrieval(database, _OneVectorEngine(SPACE.fingerprint))  # type: ignore[arg-type]  # nothing but embed is called
    assert len(await retrieval.embed_queries(_configure(SPACE), ["a", "b"])) == 2
    with pytest.raises(FailedPrecondition, match="ReindexModel") as refused:
        await retrieval.embed_queries(_configure(replace(SPACE, revision="d" * 40)), ["a"])
    assert refused.value.reason == "EMBEDDING_SPACE_CHANGED"
    assert refused.value.data.metadata["fingerprint"] == SPACE.fingerprint
    # Of before spaces were kept: it cannot be told.
    assert len(await retrieval.embed_queries(_configure(None), ["a"])) == 1


def test_a_percentile_becomes_the_threshold_that_it_is_in_the_space() -> None:
    calibrated = _configure(SPACE, Calibration(9, 0.2, 0.1, (0.0, 50.0, 100.0), (-0.1, 0.2, 0.6))).index
    settings = RetrievalSettings(similarity_percentile=75)
    resolved = resolve_threshold(settings, calibrated)
    assert resolved.similarity_percentile == 75
    assert resolved.similarity_threshold == pytest.approx(0.4)
    assert resolve_threshold(RetrievalSettings(), calibrated) == RetrievalSettings()
    lexical = replace(settings, search_mode=SearchMode.LEXICAL)
    assert resolve_threshold(lexical, None) == lexical
    with pytest.raises(FailedPrecondition) as refused:
        resolve_threshold(settings, _configure(SPACE).index)
    assert refused.value.reason == "CALIBRATION_MISSING"
