"""Searches over a real PostgreSQL: words, both legs fused, filters; each against the same thing computed here."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg.rows import TupleRow
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from server.db import search as db_search
from server.db.database import PostgresDatabase
from server.db.document_commits import DocumentKey, replace_chunks
from server.db.document_tables import IndexKey, chunk_vectors
from server.db.queue import PostgresJobQueue
from server.db.rag_indexes import insert_index
from server.domain.documents import NewDocument
from server.domain.ids import DOCUMENT, new_id
from server.domain.models import Model
from server.domain.retrieval import Chunking, MetadataCondition, RetrievalSettings, RetrievedChunk, Search, SearchMode
from server.services.diversity import choose_diverse
from server.services.lexical.analysis import analyse_passage, analyse_query
from tests.db.samples import ORGANIZATION, add_model, make_chunks, make_rag_model, make_vectors, start_job

PASSAGES = (
    "وُلد الكاتب أحمد شوقي في القاهرة سنة ١٨٦٨، ولُقّب بأمير الشعراء.",
    "تقع مدينة طرابلس على ساحل البحر المتوسط، وفيها ميناء قديم.",
    "المعلمون في المدرسة يشرحون الدرس للتلاميذ.",
    "مكتبة الإسكندرية من أشهر مكتبات العالم القديم.",
    "The lighthouse keeper climbs two hundred steps every evening.",
    "Bread is baked before sunrise in the old bakery of the harbour.",
    "Model XJ-900 weighs four kilograms and needs no battery.",
    "The harbour was rebuilt after the great storm of 1884.",
)
METADATA: tuple[dict[str, str | int | float | bool], ...] = (
    {"year": 1868, "lang": "ar", "draft": False},
    {"year": 1990, "lang": "ar"},
    {"year": 2001.5, "lang": "ar", "draft": True},
    {"year": "2001", "lang": "ar"},
    {"year": 1884, "lang": "en", "date": "2025-12-31"},
    {"lang": "en", "date": "2026-02-01"},
    {"year": True, "lang": "en", 'it\'s "k"%': "x"},
    {"year": 1, "lang": "en"},
)
DIMENSION = 16
VECTORS = make_vectors(len(PASSAGES), DIMENSION, seed=3)


@dataclass(frozen=True)
class Collection:
    """A model with one chunk per document."""

    model: Model
    documents: list[str]

    def places(self, found: Sequence[RetrievedChunk]) -> list[int]:
        """Tell the hits by their places among the passages."""
        return [self.documents.index(hit.document_id) for hit in found]


async def add_collection(
    database: PostgresDatabase, queue: PostgresJobQueue, passages: Sequence[str] = PASSAGES, vectors: NDArray[numpy.float16] = VECTORS
) -> Collection:
    model = await add_model(database, make_rag_model())
    new = [
        (new_id(DOCUMENT), NewDocument(text, metadata=METADATA[place] if place < len(METADATA) else {}))
        for place, text in enumerate(passages)
    ]
    async with database.transaction(ORGANIZATION) as transaction:
        documents = [document.document_id for document in await transaction.documents.insert(model.model_id, new)]
    lease = await start_job(database, queue, model)
    for document_id, text, vector in zip(documents, passages, vectors, strict=True):
        await queue.commit_document(lease, document_id, make_chunks([text]), vector.tobytes(), vectors.shape[1], "", len(passages))
    return Collection(model, documents)


@pytest.fixture
async def collection(database: PostgresDatabase, queue: PostgresJobQueue) -> Collection:
    """The passages above."""
    return await add_collection(database, queue)


LEXICAL = RetrievalSettings(top_k=10, similarity_threshold=-1, search_mode=SearchMode.LEXICAL)
HYBRID = replace(LEXICAL, search_mode=SearchMode.HYBRID)
DENSE = replace(LEXICAL, search_mode=SearchMode.DENSE)


def _limit(monkeypatch: pytest.MonkeyPatch, compared_chunks: int = 10_000, scanned_chunks: int = 10_000) -> None:
    """Let collections of a few chunks count as large."""
    monkeypatch.setattr(db_search.build_search, "__kwdefaults__", {"compared_chunks": compared_chunks, "scanned_chunks": scanned_chunks})


async def find(
    database: PostgresDatabase, model: Model, query: str, settings: RetrievalSettings, vector: NDArray[numpy.float16] = VECTORS[0]
) -> list[RetrievedChunk]:
    search = Search(settings, [float(number) for number in vector], analyse_query(query))
    async with database.transaction(ORGANIZATION) as transaction:
        return list(await transaction.documents.search(model.model_id, search))


def compute_bm25(passages: Sequence[str], query: str) -> dict[int, float]:
    """The lexical score of every passage that has one."""
    weights = [analyse_passage(passage).weights for passage in passages]
    counts = Counter(number for each in weights for number in each)
    scores: dict[int, float] = {}
    for place, each in enumerate(weights):
        for term in analyse_query(query):
            if term.number in each:
                rarity = math.log(1 + (len(passages) - counts[term.number] + 0.5) / (counts[term.number] + 0.5))
                scores[place] = scores.get(place, 0) + term.boost * rarity * each[term.number]
    return scores


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("متى ولد احمد شوقى؟", 0),
        ("مَتَى وُلِدَ أَحْمَدُ شَوْقِي", 0),
        ("امير الشعراء 1868", 0),
        ("الطرابلسي", 1),
        ("من هو معلم المدرسه", 2),
        ("المكتبات", 3),
        ("Who keeps the LIGHTHOUSES?", 4),
        ("bakeries", 5),
        ("xj-900", 6),
        ("great storms", 7),
    ],
)
async def test_words_find_their_passage_in_any_form(database: PostgresDatabase, collection: Collection, query: str, place: int) -> None:
    found = await find(database, collection.model, query, LEXICAL)
    assert collection.places(found)[0] == place
    assert all(hit.scores.lexical and hit.scores.similarity is None and hit.scores.fused is None for hit in found)


@pytest.mark.parametrize("query", ["The old harbour of the storm", "مدينة قديمة فيها مكتبة", "القديم old 1884"])
async def test_lexical_scores_are_bm25(database: PostgresDatabase, collection: Collection, query: str) -> None:
    expected = compute_bm25(PASSAGES, query)
    found = await find(database, collection.model, query, LEXICAL)
    assert collection.places(found) == sorted(expected, key=lambda place: -expected[place])
    assert [hit.scores.lexical for hit in found] == pytest.approx(sorted(expected.values(), reverse=True), rel=1e-4)
    assert await find(database, collection.model, query, replace(LEXICAL, top_k=2)) == found[:2]


@pytest.mark.parametrize("query", ["قشزظط", "؟!", "من هو"])
async def test_a_query_without_known_words_finds_nothing_much(database: PostgresDatabase, collection: Collection, query: str) -> None:
    found = await find(database, collection.model, query, LEXICAL)
    assert len(found) == len(compute_bm25(PASSAGES, query))


async def test_an_empty_collection_answers_nothing(database: PostgresDatabase) -> None:
    model = await add_model(database, make_rag_model())
    for settings in (LEXICAL, HYBRID, DENSE):
        assert await find(database, model, "harbour", settings) == []


def test_a_vector_is_written_as_exactly_as_it_was_embedded() -> None:
    random = numpy.random.default_rng(5)
    embedded = numpy.concatenate([random.normal(size=500), 10.0 ** random.uniform(-30, 4, 500), [0, -0.0, 1]]).astype(numpy.float32)
    written = db_search.write_vector(embedded.astype(float).tolist())
    assert numpy.array_equal(numpy.array(json.loads(written), numpy.float32), embedded)
    assert db_search.write_vector(()) == "[]"


async def test_a_large_collection_is_searched_by_its_rarest_words(
    database: PostgresDatabase, queue: PostgresJobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [f"common water number{place}" + (" lantern" if place % 10 == 0 else "") for place in range(40)]
    collection = await add_collection(database, queue, passages, make_vectors(40))
    await add_collection(database, queue, passages, make_vectors(40))
    query = "common lantern number20"
    exact = await find(database, collection.model, query, LEXICAL)
    for most in (5, 6, 39):
        _limit(monkeypatch, compared_chunks=most)
        by_words = await find(database, collection.model, query, LEXICAL)
        # number20 stands in 1 chunk and lantern in 4: all of these, and of the 40 of "common" as many as are compared at most.
        assert by_words[:4] == exact[:4]
        assert len(by_words) <= min(10, most + 4)
    _limit(monkeypatch, compared_chunks=3)
    # lantern is a common word now, and so is what stands beside it: of those that have both, three.
    found = collection.places(await find(database, collection.model, query, LEXICAL))
    assert found[0] == 20
    assert len({0, 10, 30} & set(found[1:4])) >= 2


async def test_common_words_find_what_has_two_of_them(
    database: PostgresDatabase, queue: PostgresJobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = ["red"] * 20 + ["blue"] * 20 + ["green"] * 21 + ["red green", "blue green", "red blue"]
    collection = await add_collection(database, queue, passages, make_vectors(len(passages)))
    _limit(monkeypatch, compared_chunks=5)
    found = collection.places(await find(database, collection.model, "red blue green", LEXICAL))
    assert sorted(found[:3]) == [61, 62, 63]
    assert collection.places(await find(database, collection.model, "green blue", LEXICAL))[0] == 62
    assert len(found) <= 3 + 5


@pytest.mark.parametrize("query", ["red", "red blue", "absent"])
async def test_no_more_is_read_for_common_words_than_what_has_them(
    database: PostgresDatabase, queue: PostgresJobQueue, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    passages = ["red"] * 20 + ["blue"] * 20 + ["green"] * 21 + ["red green", "blue green", "red blue"]
    collection = await add_collection(database, queue, passages, make_vectors(len(passages)))
    _limit(monkeypatch, compared_chunks=5)
    with analysing() as plans:
        await find(database, collection.model, query, LEXICAL)
    (plan,) = plans
    with_all, with_any = ([node for node in walk(plan) if f"words {sign}" in describe(node)] for sign in ("@>", "&&"))
    # Every chunk contains an empty list of words: a test of two words where the query has one must find nothing, and not everything.
    assert len(with_all) >= 3
    assert count_rows(with_all) == (1 if query == "red blue" else 0)
    assert count_rows(with_any) <= 5


async def test_the_few_documents_of_a_filter_are_not_looked_for_chunk_by_chunk_in_a_large_collection(
    database: PostgresDatabase, queue: PostgresJobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = await add_collection(database, queue, ["red"] * 60, make_vectors(60))
    _limit(monkeypatch, compared_chunks=5)
    with analysing() as plans:
        found = await find(database, collection.model, "red", replace(LEXICAL, filter=(MetadataCondition("lang", equals="ar"),)))
    assert set(collection.places(found)) == {0, 1, 2, 3}
    # Not that the document of each chunk is looked at, as it is where a filter keeps many.
    assert max(node["Actual Loops"] for node in walk(plans[0]) if node.get("Relation Name") == "documents") <= 4


async def test_a_chunk_that_words_alone_found_is_compared_once(
    database: PostgresDatabase, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db_search, "FUSED_PER_LEG", 3)
    with analysing() as plans:
        await find(database, collection.model, "old harbour storm", replace(HYBRID, top_k=2), VECTORS[0])
    read = [node for node in walk(plans[0]) if node.get("Relation Name") == "chunk_vectors" and node["Actual Rows"]]
    # The scan of the small collection; and one look-up for what it did not give, in whatever order they come.
    assert sorted(round(node["Actual Rows"] * node["Actual Loops"]) for node in read)[1:] == [len(PASSAGES)]


@contextmanager
def analysing() -> Iterator[list[dict[str, Any]]]:
    """Give the plans of the searches that run meanwhile, with the rows that each of their nodes gave."""
    plans: list[dict[str, Any]] = []

    def explain(connection: Connection, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        if statement.lstrip().startswith("WITH"):
            analysed = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)  # type: ignore[arg-type]  # as they come
            plans.append(analysed.scalar_one()[0]["Plan"])

    event.listen(Engine, "before_cursor_execute", explain)
    try:
        yield plans
    finally:
        event.remove(Engine, "before_cursor_execute", explain)


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a node of a plan and all below it."""
    yield node
    for child in node.get("Plans", ()):
        yield from walk(child)


def describe(node: dict[str, Any]) -> str:
    """The conditions that a node tests."""
    return " ".join(str(node.get(name, "")) for name in ("Index Cond", "Recheck Cond", "Filter"))


def count_rows(nodes: Sequence[dict[str, Any]]) -> int:
    return sum(round(node["Actual Rows"] * node["Actual Loops"]) for node in nodes if "Relation Name" in node)


async def test_both_legs_are_fused_by_their_ranks(database: PostgresDatabase, collection: Collection) -> None:
    query = "old harbour storm"
    words = compute_bm25(PASSAGES, query)
    stored = VECTORS.astype(numpy.float64)
    similarities = stored @ stored[6] / numpy.linalg.norm(stored, axis=1) / numpy.linalg.norm(stored[6])
    dense_order, lexical_order = list(numpy.argsort(-similarities)), sorted(words, key=lambda place: -words[place])
    for dense_weight, lexical_weight in ((1.0, 1.0), (0.5, 4.0), (0.0, 1.0), (1.0, 0.0)):
        fused = {
            place: dense_weight / (61 + dense_order.index(place))
            + (lexical_weight / (61 + lexical_order.index(place)) if place in words else 0)
            for place in range(len(PASSAGES))
        }
        # Ties by the documents' ids.
        expected = sorted((place for place in fused if fused[place] > 0), key=lambda place: (-fused[place], collection.documents[place]))
        settings = replace(HYBRID, dense_weight=dense_weight, lexical_weight=lexical_weight)
        found = await find(database, collection.model, query, settings, VECTORS[6])
        assert collection.places(found) == expected
        assert [hit.scores.fused for hit in found] == pytest.approx([fused[place] for place in expected])
        assert [hit.scores.similarity for hit in found] == pytest.approx([similarities[place] for place in expected], abs=1e-5)
        assert [hit.scores.lexical for hit in found] == pytest.approx([words.get(place, 0) for place in expected], rel=1e-4)


async def test_the_threshold_leaves_out_by_similarity_alone(database: PostgresDatabase, collection: Collection) -> None:
    everything = await find(database, collection.model, "great storm", HYBRID, VECTORS[4])
    bound = sorted(hit.scores.similarity or 0.0 for hit in everything)[4] - 1e-6
    passing = await find(database, collection.model, "great storm", replace(HYBRID, similarity_threshold=bound), VECTORS[4])
    assert passing == [hit for hit in everything if (hit.scores.similarity or 0.0) >= bound]
    assert len(passing) == len(everything) - 4
    assert collection.places(await find(database, collection.model, "great storm", replace(LEXICAL, similarity_threshold=1.0)))[0] == 7


@pytest.mark.parametrize(
    ("conditions", "places"),
    [
        ([MetadataCondition("lang", equals="ar")], {0, 1, 2, 3}),
        ([MetadataCondition("lang", equals="en"), MetadataCondition("year", equals=1884.0)], {4}),
        ([MetadataCondition("year", equals=1)], {7}),
        ([MetadataCondition("year", equals=True)], {6}),
        ([MetadataCondition("year", equals="2001")], {3}),
        ([MetadataCondition("year", any_of=(1868, True, "2001", "no"))], {0, 3, 6}),
        ([MetadataCondition("year", at_least=1868, at_most=1990)], {0, 1, 4}),
        ([MetadataCondition("year", at_least=2001)], {2}),
        ([MetadataCondition("year", at_most="3")], {3}),
        ([MetadataCondition("date", at_least="2026")], {5}),
        ([MetadataCondition("draft", equals=False)], {0}),
        ([MetadataCondition("draft", exists=True)], {0, 2}),
        ([MetadataCondition("date", exists=False), MetadataCondition("year", exists=True)], {0, 1, 2, 3, 6, 7}),
        ([MetadataCondition('it\'s "k"%', equals="x")], {6}),
        ([MetadataCondition("lang", equals="fr")], set()),
    ],
)
async def test_only_documents_whose_metadata_match_are_found(
    database: PostgresDatabase, collection: Collection, conditions: list[MetadataCondition], places: set[int]
) -> None:
    query = " ".join(PASSAGES)  # words of every passage
    for settings in (DENSE, LEXICAL, HYBRID):
        found = await find(database, collection.model, query, replace(settings, filter=tuple(conditions)))
        assert set(collection.places(found)) == places, settings.search_mode


async def test_keys_that_no_document_has_are_told(database: PostgresDatabase, collection: Collection) -> None:
    empty = await add_model(database, make_rag_model())
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.documents.list_unknown_keys(collection.model.model_id, ["lang", "Lang", "date", "x' OR true"]) == [
            "Lang",
            "x' OR true",
        ]
        assert await transaction.documents.list_unknown_keys(empty.model_id, ["lang"]) == []


async def test_only_the_asked_index_is_searched(
    database: PostgresDatabase, collection: Collection, sql: psycopg.Connection[TupleRow]
) -> None:
    model_id = collection.model.model_id
    async with database.begin() as connection:
        second = IndexKey(ORGANIZATION, model_id, 2)
        await insert_index(connection, second, "other", Chunking())
        document = DocumentKey(second, collection.documents[4])
        await replace_chunks(connection, document, chunk_vectors, make_chunks(["A lantern, shorter."]), VECTORS[:1].tobytes(), DIMENSION)
    for settings in (DENSE, LEXICAL, HYBRID):
        search = Search(settings, [float(number) for number in VECTORS[0]], analyse_query("lantern lighthouse"))
        async with database.transaction(ORGANIZATION) as transaction:
            first = await transaction.documents.search(model_id, search)
            found = await transaction.documents.search(model_id, replace(search, index_number=2))
        assert "A lantern, shorter." not in [hit.chunk.text for hit in first]
        assert [hit.chunk.text for hit in found] == ["A lantern, shorter."]
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.documents.delete(model_id, collection.documents[4])
    assert _read_counts(sql) == _count([text for place, text in enumerate(PASSAGES) if place != 4])


def _read_counts(sql: psycopg.Connection[TupleRow]) -> dict[int, int]:
    return dict(sql.execute("SELECT term, chunk_count FROM term_counts WHERE chunk_count <> 0").fetchall())


def _count(passages: Sequence[str]) -> dict[int, int]:
    counts = Counter(number for passage in passages for number in analyse_passage(passage).weights)
    return {**counts, 0: len(passages)} if passages else {}


async def test_terms_are_counted_as_documents_come_change_and_go(
    database: PostgresDatabase, queue: PostgresJobQueue, collection: Collection, sql: psycopg.Connection[TupleRow]
) -> None:
    assert _read_counts(sql) == _count(PASSAGES)
    model_id = collection.model.model_id
    async with database.transaction(ORGANIZATION) as transaction:
        for document_id in collection.documents[:3]:
            await transaction.documents.delete(model_id, document_id)
    assert _read_counts(sql) == _count(PASSAGES[3:])
    lease = await start_job(database, queue, collection.model)
    changed = make_chunks(["A changed harbour", "has two chunks"])
    await queue.commit_document(lease, collection.documents[7], changed, VECTORS[:2].tobytes(), DIMENSION, "", 1)
    assert _read_counts(sql) == _count([*PASSAGES[3:7], "A changed harbour", "has two chunks"])
    async with database.transaction(ORGANIZATION) as transaction:
        for document_id in collection.documents[3:]:
            await transaction.documents.delete(model_id, document_id)
    assert _read_counts(sql) == {}


def _compare(vectors: NDArray[numpy.float16]) -> NDArray[numpy.float64]:
    """The similarities of all vectors to each other."""
    unit = vectors.astype(numpy.float64)
    unit /= numpy.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("settings", [DENSE, HYBRID, LEXICAL], ids=lambda settings: settings.search_mode)
async def test_chunks_that_are_unlike_each_other_are_chosen(
    database: PostgresDatabase, queue: PostgresJobQueue, settings: RetrievalSettings
) -> None:
    vectors = make_vectors(12, 4, seed=8)
    collection = await add_collection(database, queue, [f"harbour storm {'old ' * n}" for n in range(12)], vectors)
    plain = await find(database, collection.model, "harbour storm", replace(settings, top_k=12), vectors[0])
    pairs = _compare(vectors)
    order = collection.places(plain)
    scores = [(hit.scores.similarity if settings is DENSE else hit.scores.fused or hit.scores.lexical) or 0.0 for hit in plain]
    shares = scores if settings is DENSE else [score / scores[0] for score in scores]
    ranked = [[float(pairs[one, other]) for other in order[:number]] for number, one in enumerate(order)]
    for mmr_lambda in (0.0, 0.4, 0.9):  # at 0.5 all that is likest to the query ties
        expected = [order[number] for number in choose_diverse(shares, ranked, mmr_lambda, 5)]
        found = await find(database, collection.model, "harbour storm", replace(settings, top_k=5, mmr_lambda=mmr_lambda), vectors[0])
        assert collection.places(found) == expected
        assert expected != order[:5] or mmr_lambda > 0.5


async def test_a_document_gives_no_more_chunks_than_it_may(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await add_model(database, make_rag_model())
    texts = {name: [f"harbour {name} {n}" for n in range(6)] for name in ("storm", "bakery", "library")}
    new = [(new_id(DOCUMENT), NewDocument(name)) for name in texts]
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.documents.insert(model.model_id, new)
    lease = await start_job(database, queue, model)
    vectors = make_vectors(18, DIMENSION, seed=4)
    for number, ((document_id, _), chunks) in enumerate(zip(new, texts.values(), strict=True)):
        data = vectors[number * 6 : number * 6 + 6]
        await queue.commit_document(lease, document_id, make_chunks(chunks), data.tobytes(), DIMENSION, "", 3)
    for settings in (DENSE, LEXICAL, HYBRID):
        everything = await find(database, model, "harbour storm", replace(settings, top_k=18), vectors[0])
        for most in (1, 2):
            expected = [hit for n, hit in enumerate(everything) if [h.document_id for h in everything[:n]].count(hit.document_id) < most]
            found = await find(database, model, "harbour storm", replace(settings, top_k=4, max_chunks_per_document=most), vectors[0])
            assert found == expected[:4]
            assert len(found) == min(4, 3 * most)
