"""Searching as a use case: which legs run, what a model's settings and a request's make together, what is refused."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.db.database import PostgresDatabase
from server.domain.documents import NewDocument
from server.domain.errors import InvalidInput, Unavailable
from server.domain.generation import ChatMessage, Role
from server.domain.models import Model
from server.domain.retrieval import MetadataCondition, Rerank, RetrievalOverrides, RetrievalSettings, SearchMode
from server.inference.client import EngineClient
from server.services.rag_models import default_retrieval, find_warnings, merge_retrieval
from server.services.requests import Retrieve
from server.services.retrieval import Retrieval
from tests.db.samples import ORGANIZATION, add_model, make_rag_model
from tests.services.libraries import index_documents

TEXTS = ("منارة أورفال تضيء الميناء منذ ١٨٨٤.", "The lighthouse of Orvale lights the harbour.")


@dataclass(frozen=True)
class Library:
    """The use cases over a model with two documents. Its engine does not run: whatever needs an embedding fails."""

    retrieval: Retrieval
    model: Model

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
    yield Library(Retrieval(database, engine), model)
    await engine.close()


async def test_words_are_searched_without_an_embedding_model(library: Library) -> None:
    assert await library.find("متى أضاءت المناره الميناء") == [TEXTS[0]]
    assert await library.find("HARBOURS") == [TEXTS[1]]
    for mode in (SearchMode.DENSE, SearchMode.HYBRID):
        with pytest.raises(Unavailable):
            await library.find("harbour", search_mode=mode)


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
