"""EvaluateRetrieval: asks a model's index queries whose answers are known, in one or several ways, and measures what comes back."""

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from server.domain.datasets import DatasetFormat, RecordKind
from server.domain.errors import DeadlineExceeded, FailedPrecondition, InvalidInput
from server.domain.models import RagConfiguration
from server.domain.record_forms import parse_json
from server.domain.records import RecordInvalid
from server.domain.retrieval import RetrievalSettings, SearchMode
from server.domain.retrieval_evaluation import (
    Latency,
    RetrievalComparison,
    RetrievalEvaluation,
    RetrievalQuery,
    RetrievalScores,
    Span,
    check_query,
    parse_query,
)
from server.services.followups import StandingQuery
from server.services.ports import Database, Files
from server.services.rag_models import merge_retrieval
from server.services.ranking import RANKED, Ranking, average, compare, rank_chunks, summarise
from server.services.relevance import locate_relevant
from server.services.requests import Candidate, EvaluateRetrieval
from server.services.retrieval import Retrieval, RetrievalTimings
from server.services.validation import MAX_SEED, MAX_TOP_K, Violations, check_retrieval

MAX_INLINE_QUERIES = 2_000
MAX_DATASET_QUERIES = 5_000
MAX_DATASET_BYTES = 64 << 20  # read whole, in this process
MAX_CANDIDATES = 8
MAX_CANDIDATE_NAME = 100
MAX_K_VALUES = 10
DEFAULT_K_VALUES = (1, 3, 5, 10)
DEFAULT_TIMEOUT_SECONDS = 300.0
MAX_TIMEOUT_SECONDS = 540.0  # below the edge's own 600
MAX_NAMED_QUERIES = 20
EMBEDDED_AT_ONCE = 64
TIMED_EMBEDDINGS = 32  # queries that are embedded once more, each alone, as a Retrieve does it
SEARCHES_AT_ONCE = 2  # leaves connections for others, and times what a search takes, not how long it waits


class _Queries(NamedTuple):
    """Queries with how they are named in errors, and how many records were none."""

    queries: Sequence[RetrievalQuery]
    fields: Sequence[str]
    invalid_count: int


class _Asked(NamedTuple):
    """What every way to search is asked: texts, their vectors (None: none is needed), and the places of what is relevant to each."""

    organization: str
    model_id: str
    rag: RagConfiguration
    texts: Sequence[str]
    vectors: Sequence[Sequence[float] | None]
    relevant: Sequence[Sequence[Sequence[Span]]]


@dataclass(frozen=True, slots=True)
class _Run:
    """What one way to search gave: a ranking per query, and the seconds of each stage per query."""

    name: str
    settings: RetrievalSettings
    rankings: Sequence[Ranking]
    timings: Sequence[RetrievalTimings]


class RetrievalEvaluator:
    """The use case EvaluateRetrieval."""

    def __init__(self, database: Database, retrieval: Retrieval, files: Files) -> None:
        self._database = database
        self._retrieval = retrieval
        self._files = files

    async def evaluate(self, organization: str, request: EvaluateRetrieval) -> RetrievalEvaluation:
        """Measure. Raises InvalidInput naming every bad field, NotFound, FailedPrecondition, DeadlineExceeded, Unavailable."""
        _check(request)
        limit = request.timeout_seconds or DEFAULT_TIMEOUT_SECONDS
        try:
            async with asyncio.timeout(limit):
                return await self._evaluate(organization, request)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The evaluation took longer than {limit:g} seconds. Ask fewer queries at once, or set timeout_seconds.",
                reason="EVALUATION_TIMED_OUT",
            ) from None

    async def _evaluate(self, organization: str, request: EvaluateRetrieval) -> RetrievalEvaluation:
        rag = await self._retrieval.read_configuration(organization, request.model_id)
        read = await self._read_queries(organization, request)
        found = Violations()
        async with self._database.transaction(organization) as transaction:
            relevant = await locate_relevant(transaction, found, request.model_id, rag.index_number, read.queries, read.fields)
        found.raise_if_any()
        k_values = sorted(set(request.k_values)) or list(DEFAULT_K_VALUES)
        candidates = _fill_in(request.candidates, rag, max(RANKED, *k_values))
        texts = [query.query for query in read.queries]
        needs_vectors = any(_needs_vectors(settings) for _, settings in candidates)
        vectors = await self._embed(rag, texts) if needs_vectors else [None] * len(texts)
        asked = _Asked(organization, request.model_id, rag, texts, vectors, relevant)
        runs = [await self._run(asked, place, name, settings) for place, (name, settings) in enumerate(candidates)]
        embedding = [await self._time_embedding(rag, texts)] if needs_vectors else []
        results = [_score(run, texts, k_values, embedding if _needs_vectors(run.settings) else []) for run in runs]
        # Seconds of plain Python for thousands of queries: other calls go on meanwhile.
        comparisons = await asyncio.to_thread(lambda: [_compare(run, runs[0], k_values[-1], request.seed or 0) for run in runs[1:]])
        return RetrievalEvaluation(results, comparisons, len(texts), read.invalid_count)

    async def _run(self, asked: _Asked, place: int, name: str, settings: RetrievalSettings) -> _Run:
        """Search every query in one way, a few at a time."""
        slots = asyncio.Semaphore(SEARCHES_AT_ONCE)

        async def search(text: str, vector: Sequence[float] | None, passages: Sequence[Sequence[Span]]) -> tuple[Ranking, RetrievalTimings]:
            async with slots:
                retrieved = await self._retrieval.search(
                    asked.organization, asked.model_id, StandingQuery(text), asked.rag, settings, vector
                )
            return rank_chunks(retrieved.chunks, passages), retrieved.timings

        try:
            async with asyncio.TaskGroup() as group:
                each = zip(asked.texts, asked.vectors, asked.relevant, strict=True)
                tasks = [group.create_task(search(*query)) for query in each]
        except ExceptionGroup as failed:
            raise _name_field(failed.exceptions[0], place) from None
        done = [task.result() for task in tasks]
        return _Run(name, settings, [ranking for ranking, _ in done], [timings for _, timings in done])

    async def _embed(self, rag: RagConfiguration, texts: Sequence[str]) -> list[Sequence[float] | None]:
        """Embed the queries in batches."""
        vectors: list[Sequence[float] | None] = []
        for first in range(0, len(texts), EMBEDDED_AT_ONCE):
            batch = await self._retrieval.embed_queries(rag, texts[first : first + EMBEDDED_AT_ONCE])
            vectors += [array("d", vector) for vector in batch]
        return vectors

    async def _time_embedding(self, rag: RagConfiguration, texts: Sequence[str]) -> Latency:
        seconds = []
        for text in texts[:TIMED_EMBEDDINGS]:
            start = time.perf_counter()
            await self._retrieval.embed_queries(rag, [text])
            seconds.append(time.perf_counter() - start)
        return summarise("embed", seconds)

    async def _read_queries(self, organization: str, request: EvaluateRetrieval) -> _Queries:
        if not request.dataset_id:
            return _Queries(request.queries, [f"queries[{place}]" for place in range(len(request.queries))], 0)
        async with self._database.transaction(organization) as transaction:
            dataset = await transaction.datasets.get(request.dataset_id)
        is_plain = dataset.format is DatasetFormat.JSONL and dataset.compression is None
        if dataset.record_kind is not RecordKind.RETRIEVAL or not is_plain:
            raise FailedPrecondition(
                "The dataset is not one of retrieval queries: upload a JSONL file, not packed, of records with `query` and `relevant`.",
                reason="DATASET_NOT_OF_QUERIES",
                metadata={"dataset_id": dataset.dataset_id},
            )
        if dataset.record_count > MAX_DATASET_QUERIES or dataset.size_bytes > MAX_DATASET_BYTES:
            limits = f"at most {MAX_DATASET_QUERIES:,} queries and {MAX_DATASET_BYTES >> 20} MiB are asked at once"
            raise InvalidInput.field("dataset_id", f"has {dataset.record_count:,} records in {dataset.size_bytes:,} bytes; {limits}")
        path = await self._files.fetch(dataset.path)
        return await asyncio.to_thread(lambda: _parse(path.read_bytes()))


def _parse(data: bytes) -> _Queries:
    """Read the records of a file, as its upload has: what is no query is left out."""
    queries, names, invalid = [], [], 0
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
            if not isinstance(value, dict):
                raise RecordInvalid("NOT_AN_OBJECT", "The record is not an object with fields.")
            queries.append(parse_query(value))
            names.append(f"dataset_id.line[{number}]")
        except RecordInvalid:
            invalid += 1
    return _Queries(queries, names, invalid)


def _needs_vectors(settings: RetrievalSettings) -> bool:
    return settings.search_mode is not SearchMode.LEXICAL


def _fill_in(candidates: Sequence[Candidate], rag: RagConfiguration, depth: int) -> Sequence[tuple[str, RetrievalSettings]]:
    """Fill in names and settings of the ways to search; as many chunks as the measures need, where a way does not say itself."""
    given = candidates or [Candidate()]
    own = replace(rag.retrieval, top_k=depth)
    return [(each.name or str(number), merge_retrieval(own, each.retrieval)) for number, each in enumerate(given, start=1)]


def _score(run: _Run, texts: Sequence[str], k_values: Sequence[int], embedding: Sequence[Latency]) -> RetrievalScores:
    rankings = run.rankings
    missed = [text for text, ranking in zip(texts, rankings, strict=True) if all(rank is None for rank in ranking.ranks)]
    return RetrievalScores(
        name=run.name,
        settings=run.settings,
        recall=[(k, average([ranking.recall(k) for ranking in rankings])) for k in k_values],
        mrr_at_10=average([ranking.reciprocal_rank for ranking in rankings]),
        ndcg_at_10=average([ranking.gain for ranking in rankings]),
        empty_rate=average([float(ranking.chunk_count == 0) for ranking in rankings]),
        latencies=[*embedding, *_summarise_stages(run.timings)],
        missed_queries=missed[:MAX_NAMED_QUERIES],
    )


def _summarise_stages(timings: Sequence[RetrievalTimings]) -> list[Latency]:
    """Summarise every stage that ran, but the embedding, which was done ahead, and the sum of all."""
    stages = [field.name for field in fields(RetrievalTimings) if field.name not in ("embed_seconds", "total_seconds")]
    seconds = {stage.removesuffix("_seconds"): [getattr(each, stage) for each in timings] for stage in stages}
    return [summarise(stage, values) for stage, values in seconds.items() if any(values)]


def _compare(run: _Run, baseline: _Run, k: int, seed: int) -> RetrievalComparison:
    measures: dict[str, Callable[[Ranking], float]] = {
        f"recall_at_{k}": lambda ranking: ranking.recall(k),
        "mrr_at_10": lambda ranking: ranking.reciprocal_rank,
        "ndcg_at_10": lambda ranking: ranking.gain,
    }
    differences = [
        compare(measure, [value(ranking) for ranking in run.rankings], [value(ranking) for ranking in baseline.rankings], seed)
        for measure, value in measures.items()
    ]
    return RetrievalComparison(run.name, baseline.name, differences)


def _name_field(error: Exception, place: int) -> Exception:
    """Say of a search that was refused which way to search it was."""
    if not isinstance(error, InvalidInput):
        return error
    found = Violations()
    found.extend(error, f"configurations[{place}].")
    return InvalidInput.of(found.found, error.reason)


def _check(request: EvaluateRetrieval) -> None:
    found = Violations()
    if not request.model_id:
        found.add("model_id", "is required")
    if bool(request.queries) == bool(request.dataset_id):
        found.add("queries", "give exactly one of queries and dataset_id")
    if len(request.queries) > MAX_INLINE_QUERIES:
        found.add("queries", f"must be at most {MAX_INLINE_QUERIES:,}, not {len(request.queries):,}: upload more as a dataset")
    for place, query in enumerate(request.queries[:MAX_INLINE_QUERIES]):
        for field, problem in check_query(query):
            found.add(f"queries[{place}].{field}", problem)
    check_candidates(found, request.candidates)
    if len(request.k_values) > MAX_K_VALUES:
        found.add("k_values", f"must be at most {MAX_K_VALUES}, not {len(request.k_values)}")
    for place, k in enumerate(request.k_values[:MAX_K_VALUES]):
        found.number(f"k_values[{place}]", k, 1, MAX_TOP_K)
    found.number("seed", request.seed, 0, MAX_SEED)
    found.number("timeout_seconds", request.timeout_seconds, 0, MAX_TIMEOUT_SECONDS, above=True)
    found.raise_if_any()


def check_candidates(found: Violations, candidates: Sequence[Candidate]) -> None:
    """Check the ways to search."""
    if len(candidates) > MAX_CANDIDATES:
        found.add("configurations", f"must be at most {MAX_CANDIDATES}, not {len(candidates)}")
        return
    names = [each.name or str(number) for number, each in enumerate(candidates, start=1)]
    for place, each in enumerate(candidates):
        found.text(f"configurations[{place}].name", each.name, MAX_CANDIDATE_NAME)
        if names[place] in names[:place]:
            found.add(f"configurations[{place}].name", f"{names[place][:MAX_CANDIDATE_NAME]!r} is the name of another one")
        check_retrieval(found, each.retrieval, f"configurations[{place}].retrieval.")
