"""Models: what is served, its versions, and the settings of a RAG model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from server.domain.embeddings import EmbeddingBackend
from server.domain.errors import ErrorData
from server.domain.rag_indexes import RagIndex
from server.domain.retrieval import FIRST_INDEX, Chunking, RetrievalSettings
from server.domain.specs import ExportFormat, FineTuneSpec


class ModelType(StrEnum):
    """What a model is made of."""

    FINE_TUNED = "FINE_TUNED"
    RAG = "RAG"
    BASE = "BASE"


class ModelState(StrEnum):
    """Where a model stands. READY from its first finished version (or index) on."""

    CREATING = "CREATING"
    READY = "READY"
    FAILED = "FAILED"
    DELETING = "DELETING"


# The error of a model that will never be READY, since the job that was to make it was cancelled.
JOB_CANCELLED = ErrorData("CANCELLED", "JOB_CANCELLED", "The job that was to make the model was cancelled.")


@dataclass(frozen=True, slots=True)
class RagConfiguration:
    """What a RAG model answers with. `generator_model_id` is a base model or a fine-tuned one; `index` is the one that answers.

    `index` None: the model is not stored yet.
    """

    generator_model_id: str
    embedding_model: str
    retrieval: RetrievalSettings
    chunking: Chunking
    prompt_template: str
    index: RagIndex | None = None
    embedding_backend: EmbeddingBackend = EmbeddingBackend.FLOAT32

    @property
    def index_number(self) -> int:
        """The number of the index that answers."""
        return self.index.index_number if self.index else FIRST_INDEX


@dataclass(frozen=True, slots=True)
class Model:
    """A model as stored, with counts of what belongs to it."""

    model_id: str
    type: ModelType
    display_name: str
    state: ModelState
    base_model: str
    create_time: datetime
    update_time: datetime
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    technique: str = ""
    serving_version: int | None = None
    version_count: int = 0
    rag: RagConfiguration | None = None
    document_count: int = 0
    chunk_count: int = 0
    error: ErrorData | None = None


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of a version or of its export, by its path in there."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelExport:
    """A version in another form, ready to download. `artifact_path` is relative to MODEL_STORAGE_PATH."""

    format: ExportFormat
    job_id: str
    artifact_path: str
    manifest_sha256: str
    size_bytes: int
    create_time: datetime
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """An immutable result. `artifact_path` is relative to MODEL_STORAGE_PATH; `manifest_sha256` seals every file in it."""

    model_id: str
    version: int
    job_id: str
    base_model: str
    base_revision: str
    artifact_path: str
    manifest_sha256: str
    size_bytes: int
    create_time: datetime
    metrics: Mapping[str, float] = field(default_factory=dict)
    attempt: int = 1
    checkpoint_step: int = 0
    spec: FineTuneSpec | None = None  # None: made before versions kept it; the job still has it
    library_versions: Mapping[str, str] = field(default_factory=dict)
    template_sha256: str = ""
    exports: Sequence[ModelExport] = ()
