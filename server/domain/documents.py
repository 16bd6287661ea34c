"""Documents of a RAG model: the texts that are cut, embedded and cited."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from server.domain.retrieval import MetadataValue


class DocumentState(StrEnum):
    """Where a document stands; only INDEXED ones are found."""

    PENDING = "PENDING"
    INDEXED = "INDEXED"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document as a caller gives it."""

    text: str
    title: str = ""
    source_uri: str = ""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Document:
    """A stored document; its text is kept beside it and not part of listings."""

    document_id: str
    model_id: str
    title: str
    state: DocumentState
    size_characters: int
    size_bytes: int
    content_sha256: str
    create_time: datetime
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    source_uri: str = ""
    chunk_count: int = 0
    error: str = ""
