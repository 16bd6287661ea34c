"""Indexes of a RAG model: numbered, each with all vectors in one embedding space. One of them answers."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from server.domain.retrieval import Chunking, SearchPlace


class IndexState(StrEnum):
    """Where an index stands: READY once its first job has ended well."""

    BUILDING = "BUILDING"
    READY = "READY"


@dataclass(frozen=True, slots=True)
class RagIndex:
    """An index of a model. `dimension` None: nothing was embedded yet.

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

    @property
    def place(self) -> SearchPlace | None:
        """Where a search finds it, if that was looked up."""
        if not self.place_revision:
            return None
        own_table = self.index_key if self.vector_table is not None else None
        return SearchPlace(self.index_number, self.place_revision, own_table, self.dimension or 0)
