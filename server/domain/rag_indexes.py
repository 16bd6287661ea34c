"""Indexes of a RAG model: numbered, each with all vectors in one embedding space. One of them answers."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from server.domain.retrieval import Chunking


class IndexState(StrEnum):
    """Where an index stands: READY once its first job has ended well."""

    BUILDING = "BUILDING"
    READY = "READY"


@dataclass(frozen=True, slots=True)
class RagIndex:
    """An index of a model. `dimension` None: nothing was embedded yet.

    `index_key` names the table of its own that its vectors may have; `vector_table` None: they lie with those of all other indexes.
    """

    index_number: int
    embedding_model: str
    chunking: Chunking
    state: IndexState
    create_time: datetime
    index_key: int
    dimension: int | None = None
    vector_table: str | None = None
