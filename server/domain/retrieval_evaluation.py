"""Evaluation of retrieval: queries with what answers them, and what a way to search reaches. Reads the records of a dataset of queries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.domain.records import RecordInvalid
from server.domain.retrieval import RetrievalSettings

MAX_QUERY_CHARACTERS = 20_000
MAX_QUOTE_CHARACTERS = 10_000
MAX_RELEVANT = 100
MAX_OFFSET = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Relevant:
    """What answers a query: a document, a passage of one by offsets (end exclusive) or by its text, or a text wherever it stands."""

    document_id: str = ""
    char_start: int | None = None
    char_end: int | None = None
    quote: str = ""


@dataclass(frozen=True, slots=True)
class RetrievalQuery:
    """A query with what answers it."""

    query: str
    relevant: Sequence[Relevant]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a document's text, end exclusive. Both ends None: all of it."""

    document_id: str
    char_start: int | None = None
    char_end: int | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a stage took, in seconds."""

    stage: str
    p50_seconds: float
    p99_seconds: float


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """What one way to search reaches over all queries; `recall` has a pair of k and average for each k."""

    name: str
    settings: RetrievalSettings
    recall: Sequence[tuple[int, float]]
    mrr_at_10: float
    ndcg_at_10: float
    empty_rate: float
    latencies: Sequence[Latency]
    missed_queries: Sequence[str]


@dataclass(frozen=True, slots=True)
class Difference:
    """A measure's difference of averages, with its interval."""

    measure: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RetrievalComparison:
    """One way to search against another, query by query."""

    name: str
    baseline: str
    differences: Sequence[Difference]


@dataclass(frozen=True, slots=True)
class RetrievalEvaluation:
    """All of an evaluation."""

    results: Sequence[RetrievalScores]
    comparisons: Sequence[RetrievalComparison]
    query_count: int
    invalid_record_count: int = 0


def check_query(query: RetrievalQuery) -> Sequence[tuple[str, str]]:
    """Give what is wrong with a query in itself: pairs of field and sentence."""
    found = [("query", problem) for problem in _check_text(query.query, MAX_QUERY_CHARACTERS)]
    if not 1 <= len(query.relevant) <= MAX_RELEVANT:
        return [*found, ("relevant", f"must be 1 to {MAX_RELEVANT}, not {len(query.relevant)}")]
    for place, relevant in enumerate(query.relevant):
        found += [(f"relevant[{place}]{field}", problem) for field, problem in _check_relevant(relevant)]
    return found


def parse_query(value: Mapping[str, object]) -> RetrievalQuery:
    """Read a record: `query`, and `relevant` with `document_id`, `char_start` and `char_end`, or `quote`. Raises RecordInvalid."""
    text, raw = value.get("query"), value.get("relevant")
    if not isinstance(text, str) or not isinstance(raw, list):
        raise RecordInvalid("MISSING_FIELD", "`query` must be a text and `relevant` a list of what answers it.")
    query = RetrievalQuery(text, tuple(_parse_relevant(item, place) for place, item in enumerate(raw)))
    for field, problem in check_query(query):
        raise RecordInvalid("BAD_QUERY", f"{field} {problem}.")
    return query


def _parse_relevant(item: object, place: int) -> Relevant:
    if isinstance(item, str):
        return Relevant(item)
    if not isinstance(item, dict):
        raise RecordInvalid("BAD_QUERY", f"relevant[{place}] must be a document's id or an object.")
    texts = [item.get(name, "") for name in ("document_id", "quote")]
    offsets = [item.get(name) for name in ("char_start", "char_end")]
    if not all(isinstance(text, str) for text in texts):
        raise RecordInvalid("BAD_QUERY", f"relevant[{place}]: `document_id` and `quote` must be texts.")
    if not all(offset is None or (isinstance(offset, int) and not isinstance(offset, bool)) for offset in offsets):
        raise RecordInvalid("BAD_QUERY", f"relevant[{place}]: `char_start` and `char_end` must be whole numbers.")
    return Relevant(texts[0], offsets[0], offsets[1], texts[1])


def _check_relevant(relevant: Relevant) -> Sequence[tuple[str, str]]:
    start, end = relevant.char_start, relevant.char_end
    if relevant.quote:
        problems = [(".quote", problem) for problem in _check_text(relevant.quote, MAX_QUOTE_CHARACTERS)]
        return problems if start is end is None else [*problems, (".quote", "is given beside offsets: one of them names the passage")]
    if not relevant.document_id:
        return [(".document_id", "is required where there is no quote")]
    if (start is None) != (end is None):
        return [(".char_end" if end is None else ".char_start", "is required with the other offset")]
    if start is not None and end is not None and not 0 <= start < end <= MAX_OFFSET:
        return [(".char_start", f"must be from 0 to below char_end, and char_end at most {MAX_OFFSET:,}")]
    return []


def _check_text(text: str, most: int) -> Sequence[str]:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return ["must not contain NUL characters or halves of surrogate pairs"]
    if not text.strip():
        return ["must not be empty"]
    return [f"must have at most {most:,} characters, not {len(text):,}"] if len(text) > most else []
