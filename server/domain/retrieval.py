"""Retrieval: how documents are cut and searched, what comes back, and what an answer cites."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

MetadataValue = str | int | float | bool
# A model's indexes are numbered from here on; the next one is built beside the one that answers.
FIRST_INDEX = 1
# Of the headings that are embedded and searched with a chunk: more would drown a short text.
MAX_HEADING_CHARACTERS = 300


class SearchMode(StrEnum):
    """Which legs search: vectors, words, or both fused."""

    DENSE = "DENSE"
    LEXICAL = "LEXICAL"
    HYBRID = "HYBRID"


@dataclass(frozen=True, slots=True)
class Chunking:
    """How documents are cut, in tokens of the embedding model's own tokenizer. max_tokens 0: all that the model reads, at most 256."""

    max_tokens: int = 0
    overlap_tokens: int = 32


@dataclass(frozen=True, slots=True)
class MetadataCondition:
    """What a document's metadata must hold under a key. Exactly one test is set; of a range, one bound or both, of one type."""

    key: str
    equals: MetadataValue | None = None
    any_of: tuple[MetadataValue, ...] = ()
    at_least: int | float | str | None = None
    at_most: int | float | str | None = None
    exists: bool | None = None


MetadataFilter = tuple[MetadataCondition, ...]  # all must hold


@dataclass(frozen=True, slots=True)
class Rerank:
    """The best candidates scored again by a cross-encoder. candidates 0: four times top_k. An empty model: none."""

    model: str
    candidates: int = 0
    timeout_seconds: float = 2.0


MAX_CANDIDATES = 1_000


@dataclass(frozen=True, slots=True)
class RetrievalSettings:
    """A model's search defaults. similarity_threshold applies to `1 - cosine distance` (-1 to 1) only.

    `similarity_percentile` rules in its place where it is set: the similarity that so many percent of unrelated pairs do not exceed.
    """

    top_k: int = 5
    similarity_threshold: float = 0.3
    search_mode: SearchMode = SearchMode.DENSE
    max_context_tokens: int = 0
    dense_weight: float = 1.0
    lexical_weight: float = 1.0
    filter: MetadataFilter = ()
    rerank: Rerank | None = None
    # At most so many chunks of one document; 0: any number.
    max_chunks_per_document: int = 0
    # Maximal marginal relevance: how much relevance counts against being unlike what was chosen before, 0 to 1; 1: alone.
    mmr_lambda: float = 1.0

    similarity_percentile: float | None = None

    @property
    def is_diverse(self) -> bool:
        """Whether chunks are chosen to be unlike each other."""
        return self.mmr_lambda < 1

    @property
    def candidate_count(self) -> int:
        """How many chunks a search must give: those that are scored again, or those that are answered."""
        if self.rerank is None:
            return self.top_k
        return self.rerank.candidates or min(4 * self.top_k, MAX_CANDIDATES)


@dataclass(frozen=True, slots=True)
class RetrievalOverrides:
    """What one request changes of the model's defaults; None keeps it."""

    top_k: int | None = None
    similarity_threshold: float | None = None
    search_mode: SearchMode | None = None
    max_context_tokens: int | None = None
    dense_weight: float | None = None
    lexical_weight: float | None = None
    filter: MetadataFilter | None = None
    rerank: Rerank | None = None
    max_chunks_per_document: int | None = None
    mmr_lambda: float | None = None
    similarity_percentile: float | None = None


@dataclass(frozen=True, slots=True)
class QueryTerm:
    """A term that is searched for, by its number, and how much it counts. Words are stems; the others are n-grams."""

    number: int
    boost: float
    is_word: bool


class PlaceChanged(Exception):
    """An index does not lie any more where a search was sent, or something about its model has changed. Look it up again."""


@dataclass(frozen=True, slots=True)
class SearchPlace:
    """Where an index's chunks lay when it was looked up: its number, the key of the table of its vectors' own, if they have one.

    `revision` is of the model and its index: it changes with anything that is stored about them.
    """

    index_number: int
    revision: str
    own_table: int | None = None
    dimension: int = 0


@dataclass(frozen=True, slots=True)
class Search:
    """A search as the database runs it: the settings, and the query as a unit vector (not for LEXICAL) and as terms (not for DENSE).

    `index_number` is the model's index that is searched. `place`: where it lay when it was looked up; None: look it up.
    """

    settings: RetrievalSettings
    vector: Sequence[float] = ()
    terms: Sequence[QueryTerm] = ()
    index_number: int = FIRST_INDEX
    place: SearchPlace | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document as cut by the index job. Offsets are in characters (code points) of the original text, end exclusive.

    `heading_path` are the headings that it stands under, outermost first.
    """

    chunk_id: str
    position: int
    text: str
    char_start: int
    char_end: int
    token_count: int
    page: int | None = None
    heading_path: tuple[str, ...] = ()

    @property
    def headings(self) -> tuple[str, ...]:
        """The innermost of its headings that fit before its text; those that its text begins with are not said twice."""
        lines = [line.strip("# \t") for line in self.text.split("\n", 3 * len(self.heading_path)) if line.strip()]
        path = [heading for heading in self.heading_path if heading not in lines[: len(self.heading_path)]]
        room = MAX_HEADING_CHARACTERS
        kept: list[str] = []
        while path and len(path[-1]) < room:
            kept.insert(0, path.pop())
            room -= len(kept[0]) + 1
        return tuple(kept)

    @property
    def searched_text(self) -> str:
        """What searches compare with: its text under its headings."""
        return "\n".join((*self.headings, self.text))

    @property
    def content_hash(self) -> str:
        """The hash of all that its vector depends on within one index, 32 hexadecimal digits."""
        return blake2b("\x1f".join((*self.heading_path, self.text)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Scores:
    """Each score under its own name; None where that leg did not run."""

    similarity: float | None = None
    lexical: float | None = None
    fused: float | None = None
    rerank: float | None = None


@dataclass(frozen=True, slots=True)
class RetrievedChunk:
    """A chunk that a search found, with its document's title and metadata.

    `page_breaks`: where pages after the chunk's own begin within it, rising, as offsets in the document's text.
    """

    chunk: Chunk
    document_id: str
    title: str
    scores: Scores
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    page_breaks: Sequence[int] = ()

    def find_page(self, char_offset: int) -> int | None:
        """Give the page that a character of the chunk stands on; None in a document without pages."""
        return None if self.chunk.page is None else self.chunk.page + bisect_right(self.page_breaks, char_offset)


class RerankFailure(StrEnum):
    """Why the order of the search stands."""

    TIMEOUT = "TIMEOUT"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class RerankOutcome:
    """What became of a reranking; `message` says why not, as a sentence."""

    candidate_count: int
    failure: RerankFailure | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Citation:
    """A verified quote: `quote` stands at char_start:char_end of the document's original text. `source` numbers the chunks from 1."""

    document_id: str
    chunk_id: str
    char_start: int
    char_end: int
    quote: str
    source: int
    page: int | None = None
