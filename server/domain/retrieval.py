"""Retrieval: how documents are cut and searched, what comes back, and what an answer cites."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MetadataValue = str | int | float | bool


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
class RetrievalSettings:
    """A model's search defaults. similarity_threshold applies to `1 - cosine distance` (-1 to 1) only."""

    top_k: int = 5
    similarity_threshold: float = 0.3
    search_mode: SearchMode = SearchMode.DENSE
    max_context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RetrievalOverrides:
    """What one request changes of the model's defaults; None keeps it."""

    top_k: int | None = None
    similarity_threshold: float | None = None
    search_mode: SearchMode | None = None
    max_context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document as cut by the index job. Offsets are in characters (code points) of the original text, end exclusive."""

    chunk_id: str
    position: int
    text: str
    char_start: int
    char_end: int
    token_count: int
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Each score under its own name; None where that leg did not run."""

    similarity: float | None = None
    lexical: float | None = None
    fused: float | None = None
    rerank: float | None = None


@dataclass(frozen=True, slots=True)
class RetrievedChunk:
    """A chunk that a search found, with its document's title and metadata."""

    chunk: Chunk
    document_id: str
    title: str
    scores: Scores
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


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
