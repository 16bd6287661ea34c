"""EvaluateRetrieval: figures worked out by hand, several ways compared, and every bad field named. Words are searched: no engine runs."""

import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from server.db.database import PostgresDatabase
from server.domain.datasets import Compression, Dataset, DatasetFormat, RecordKind
from server.domain.documents import NewDocument
from server.domain.errors import DeadlineExceeded, FailedPrecondition, InvalidInput, NotFound, Unavailable
from server.domain.ids import DATASET, new_id
from server.domain.models import Model
from server.domain.retrieval import MetadataCondition, RetrievalOverrides, SearchMode
from server.domain.retrieval_evaluation import Relevant, RetrievalEvaluation, RetrievalQuery
from server.inference.client import EngineClient
from server.services.requests import Candidate, EvaluateRetrieval
from server.services.retrieval import Retrieval
from server.services.retrieval_evaluation import RetrievalEvaluator
from server.storage.files import LocalFiles
from tests.db.samples import ORGANIZATION, add_model, make_rag_model
from tests.services.libraries import cut, index_documents

MANY = "alpha alpha alpha."
ONE = "alpha beta gamma. Second sentence about delta."
LEXICAL = RetrievalOverrides(search_mode=SearchMode.LEXICAL)
WORDS = Candidate(retrieval=LEXICAL)
LATER = Candidate("later", replace(LEXICAL, filter=(MetadataCondition("year", at_least=2000),)))


@dataclass(frozen=True)
class Bench:
    """The use case over a model with two documents, of which the second has a date and two chunks."""

    evaluator: RetrievalEvaluator
    database: PostgresDatabase
    model: Model
    many: str
    one: str
    storage: Path

    @property
    def queries(self) -> list[RetrievalQuery]:
        """Found at rank 2, at rank 1, and not at all."""
        beta = Relevant(self.one, ONE.index("beta"), ONE.index("beta") + 4)
        return [
            RetrievalQuery("alpha", [Relevant(self.one)]),
            RetrievalQuery("beta", [beta]),
            RetrievalQuery("omega", [Relevant(self.many)]),
        ]

    async def evaluate(self, *candidates: Candidate, **changes: object) -> RetrievalEvaluation:
        """Measure these ways to search."""
        values: dict[str, object] = {"queries": self.queries, "candidates": candidates or [WORDS], **changes}
        return await self.evaluator.evaluate(ORGANIZATION, EvaluateRetrieval(self.model.model_id, **values))  # type: ignore[arg-type]

    async def store(self, *records: object, **changes: object) -> str:
        """Store a dataset of queries."""
        path = f"{ORGANIZATION}/datasets/{new_id(DATASET)}/records"
        (self.storage / path).parent.mkdir(parents=True)
        data = "".join(json.dumps(record) + "\n" for record in records)
        (self.storage / path).write_text(data)
        dataset = Dataset(
            new_id(DATASET), "q", DatasetFormat.JSONL, RecordKind.RETRIEVAL, len(records), 0, len(data), "0" * 64, path, datetime.now(UTC)
        )
        async with self.database.transaction(ORGANIZATION) as transaction:
            await transaction.datasets.insert(replace(dataset, **changes))  # type: ignore[arg-type]  # plain test data
        return dataset.dataset_id


@pytest.fixture
async def bench(database: PostgresDatabase, tmp_path: Path) -> AsyncIterator[Bench]:
    model = await add_model(database, make_rag_model())
    documents = [NewDocument(MANY), NewDocument(ONE, metadata={"year": 2026})]
    many, one = await index_documents(database, model, documents, [cut(MANY), cut(ONE, ONE.index("Second"))])
    engine = EngineClient(tmp_path / "no-engine.sock")
    evaluator = RetrievalEvaluator(database, Retrieval(database, engine), LocalFiles(tmp_path))
    yield Bench(evaluator, database, model, many, one, tmp_path)
    await engine.close()


async def test_the_figures_are_those_worked_out_by_hand(bench: Bench) -> None:
    evaluation = await bench.evaluate(k_values=(3, 1, 1))
    (scores,) = evaluation.results
    assert (evaluation.query_count, evaluation.comparisons) == (3, [])
    assert [k for k, _ in scores.recall] == [1, 3]
    assert [recall for _, recall in scores.recall] == pytest.approx([1 / 3, 2 / 3])
    assert scores.mrr_at_10 == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert scores.ndcg_at_10 == pytest.approx((1 / math.log2(3) + 1 + 0) / 3)
    assert scores.empty_rate == pytest.approx(1 / 3)
    assert scores.missed_queries == ["omega"]
    assert next(each.stage for each in scores.latencies) == "search"
    assert 0 < scores.latencies[0].p50_seconds <= scores.latencies[0].p99_seconds < 1


async def test_ways_to_search_are_compared_query_by_query(bench: Bench) -> None:
    evaluation = await bench.evaluate(WORDS, LATER, k_values=(1,))
    assert [scores.name for scores in evaluation.results] == ["1", "later"]
    assert evaluation.results[1].mrr_at_10 == pytest.approx(2 / 3)
    (comparison,) = evaluation.comparisons
    assert (comparison.name, comparison.baseline) == ("later", "1")
    assert [each.measure for each in comparison.differences] == ["recall_at_1", "mrr_at_10", "ndcg_at_10"]
    # The reciprocal ranks differ by 1/2, 0, 0: of samples of three, 8/27 hold none of the first query, 1/27 (over 2.5 %) nothing else.
    rank = comparison.differences[1]
    assert [rank.difference, rank.low, rank.high] == pytest.approx([1 / 6, 0, 1 / 2])


async def test_as_many_chunks_are_looked_at_as_the_measures_need_unless_a_way_says_itself(bench: Bench) -> None:
    evaluation = await bench.evaluate(WORDS, Candidate("one", replace(LEXICAL, top_k=1)), k_values=(50,))
    assert [scores.settings.top_k for scores in evaluation.results] == [50, 1]
    assert [scores.recall[0][1] for scores in evaluation.results] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]


async def test_passages_named_by_a_quote_are_found_where_they_stand(bench: Bench) -> None:
    queries = [
        RetrievalQuery("delta", [Relevant(quote="sentence  about")]),
        RetrievalQuery("beta", [Relevant(bench.one, quote="Second sentence")]),
    ]
    (scores,) = (await bench.evaluate(queries=queries)).results
    assert scores.missed_queries == ["beta"]
    assert scores.mrr_at_10 == 0.5


async def test_queries_come_from_a_dataset_and_bad_records_are_counted(bench: Bench) -> None:
    good = {"query": "beta", "relevant": [bench.one]}
    dataset_id = await bench.store(good, {"query": "x"}, {"query": "alpha", "relevant": [{"document_id": bench.one}]})
    evaluation = await bench.evaluate(queries=(), dataset_id=dataset_id)
    assert (evaluation.query_count, evaluation.invalid_record_count) == (2, 1)
    assert evaluation.results[0].mrr_at_10 == 0.75
    with pytest.raises(InvalidInput, match=r"dataset_id\.line\[2\]\.relevant\[0\]\.document_id: no document 'doc_gone'"):
        await bench.evaluate(queries=(), dataset_id=await bench.store(good, {"query": "x", "relevant": ["doc_gone"]}))


@pytest.mark.parametrize("change", [{"record_kind": RecordKind.CHAT}, {"format": DatasetFormat.PARQUET}, {"compression": Compression.GZIP}])
async def test_another_dataset_is_refused(bench: Bench, change: dict[str, object]) -> None:
    with pytest.raises(FailedPrecondition, match="JSONL"):
        await bench.evaluate(queries=(), dataset_id=await bench.store({"query": "x"}, **change))


async def test_a_dataset_that_is_too_large_or_not_there_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidInput, match="at most 5,000 queries"):
        await bench.evaluate(queries=(), dataset_id=await bench.store({"query": "x"}, record_count=5_001))
    with pytest.raises(NotFound):
        await bench.evaluate(queries=(), dataset_id="ds_no")


async def test_what_stands_nowhere_is_refused_by_name(bench: Bench) -> None:
    queries = [
        RetrievalQuery("a", [Relevant(bench.one), Relevant("doc_gone")]),
        RetrievalQuery("b", [Relevant(bench.one, 0, 10_000), Relevant(quote="no such words"), Relevant("doc_gone", quote="beta")]),
    ]
    with pytest.raises(InvalidInput) as refused:
        await bench.evaluate(queries=queries)
    assert [violation.field for violation in refused.value.data.violations] == [
        "queries[0].relevant[1].document_id",
        "queries[1].relevant[0].char_end",
        "queries[1].relevant[1].quote",
        "queries[1].relevant[2].document_id",
    ]


async def test_every_bad_field_is_named_at_once(bench: Bench) -> None:
    with pytest.raises(InvalidInput) as refused:
        await bench.evaluate(
            Candidate("a", RetrievalOverrides(top_k=10**6)), Candidate("a", RetrievalOverrides(similarity_threshold=2)),
            queries=[RetrievalQuery("", [])], dataset_id="ds_1", k_values=(0,), seed=-1, timeout_seconds=0.0,
        )  # fmt: skip
    assert sorted(violation.field for violation in refused.value.data.violations) == [
        "configurations[0].retrieval.top_k",
        "configurations[1].name",
        "configurations[1].retrieval.similarity_threshold",
        "k_values[0]",
        "queries",
        "queries[0].query",
        "queries[0].relevant",
        "seed",
        "timeout_seconds",
    ]


async def test_a_filter_on_an_unknown_key_is_named_with_its_configuration(bench: Bench) -> None:
    misspelt = Candidate("typo", replace(LEXICAL, filter=(MetadataCondition("yaer", equals=1),)))
    with pytest.raises(InvalidInput, match=r"configurations\[1\]\.retrieval\.filter\.conditions\[0\]\.key: no document"):
        await bench.evaluate(WORDS, misspelt)


async def test_it_ends_at_its_time_limit(bench: Bench) -> None:
    with pytest.raises(DeadlineExceeded, match=r"0\.001 seconds"):
        await bench.evaluate(timeout_seconds=0.001)


async def test_vectors_need_the_engine(bench: Bench) -> None:
    with pytest.raises(Unavailable):
        await bench.evaluate(Candidate(retrieval=RetrievalOverrides(search_mode=SearchMode.HYBRID)))
