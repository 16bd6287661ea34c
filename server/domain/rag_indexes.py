"""Indexes of a RAG model: numbered, each with all vectors in one embedding space. One of them answers."""

import hashlib
import json
from bisect import bisect_left
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum

from server.domain.retrieval import Chunking, SearchPlace

FINGERPRINT_DIGITS = 32
# The reason of the error, and of a failed job: the embedding model gives other vectors now than those of the index.
SPACE_CHANGED = "EMBEDDING_SPACE_CHANGED"


class IndexState(StrEnum):
    """Where an index stands: READY once its first job has ended well."""

    BUILDING = "BUILDING"
    READY = "READY"


@dataclass(frozen=True, slots=True)
class EmbeddingSpace:
    """All that decides where the vector of a text points. Vectors of two spaces say nothing about each other.

    `revision` names the weights: the hub's commit, or the hash of the files. `pooling` LIBRARY: the model's own modules do it.
    `backend` is what computes, with its number format: an int8 model is another one than the same in float32.
    """

    embedding_model: str
    revision: str
    pooling: str
    query_prefix: str
    passage_prefix: str
    preparation: str
    max_tokens: int
    dimension: int
    backend: str

    @property
    def fingerprint(self) -> str:
        """128 bits of SHA-256 over all fields, hexadecimal: equal for the same space on any machine."""
        fields = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False).encode()
        return hashlib.sha256(fields).hexdigest()[:FINGERPRINT_DIGITS]


@dataclass(frozen=True, slots=True)
class Calibration:
    """How similar unrelated texts are in a space: of `pair_count` pairs the percent `percents[i]` are at most `similarities[i]`.

    Both rise; the first percent is 0 and the last 100.
    """

    pair_count: int
    mean: float
    deviation: float
    percents: tuple[float, ...]
    similarities: tuple[float, ...]

    def find_similarity(self, percent: float) -> float:
        """Give the similarity that so many percent of unrelated pairs do not exceed, between two measured ones in a straight line."""
        place = max(1, bisect_left(self.percents, percent))
        (low, high), (start, end) = self.percents[place - 1 : place + 1], self.similarities[place - 1 : place + 1]
        return start + (end - start) * (percent - low) / (high - low)


@dataclass(frozen=True, slots=True)
class MeasuredSpace:
    """The space that a job embeds in. `calibration` None: it was measured before, by the job that used it first."""

    space: EmbeddingSpace
    calibration: Calibration | None = None


@dataclass(frozen=True, slots=True)
class RagIndex:
    """An index of a model. `space` None: nothing was embedded yet, or before spaces were kept.

    `index_key` names the table of its own that its vectors may have; `vector_table` None: they lie with those of all other indexes.
    `place_revision`: see SearchPlace; empty where it was not asked for.
    """

    index_number: int
    embedding_model: str
    chunking: Chunking
    state: IndexState
    create_time: datetime
    index_key: int
    dimension: int | None = None
    vector_table: str | None = None
    place_revision: str = ""
    space: EmbeddingSpace | None = None
    calibration: Calibration | None = None

    @property
    def place(self) -> SearchPlace | None:
        """Where a search finds it, if that was looked up."""
        if not self.place_revision:
            return None
        own_table = self.index_key if self.vector_table is not None else None
        return SearchPlace(self.index_number, self.place_revision, own_table, self.dimension or 0)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the space; empty where that is not known."""
        return self.space.fingerprint if self.space else ""
