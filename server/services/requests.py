"""What callers ask for, decoded but not yet checked: one dataclass per request that is more than an id. None: left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from server.domain.datasets import DatasetFormat, RecordKind
from server.domain.documents import DocumentState, NewDocument
from server.domain.embeddings import EmbeddingBackend
from server.domain.findings import Finding
from server.domain.generation import ChatMessage, EmbedRole, GenerationParameters, HistoryPolicy, Priority
from server.domain.jobs import Job
from server.domain.models import Model
from server.domain.retrieval import MetadataValue, RetrievalOverrides
from server.domain.retrieval_evaluation import RetrievalQuery
from server.domain.specs import ExportFormat, LossOn, OverlongPolicy, ParametersRequest, VersionReference
from server.domain.techniques import Technique
from server.services.ports import JobFilter, ModelFilter

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which page of a list is wanted."""

    page_size: int | None = None
    page_token: str = ""


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """One page, newest first; an empty token says that it is the last."""

    items: Sequence[T]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class ListModels:
    """A page of models."""

    where: ModelFilter
    page: PageRequest


@dataclass(frozen=True, slots=True)
class ListJobs:
    """A page of jobs."""

    where: JobFilter
    page: PageRequest


@dataclass(frozen=True, slots=True)
class ListDocuments:
    """A page of a model's documents."""

    model_id: str
    page: PageRequest
    state: DocumentState | None = None


@dataclass(frozen=True, slots=True)
class ListVersions:
    """A page of a model's versions."""

    model_id: str
    page: PageRequest


@dataclass(frozen=True, slots=True)
class ExportVersion:
    """A version to write as files; the format None: as it is."""

    model_id: str
    version: int
    format: ExportFormat | None = None
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class UpdateModel:
    """Names, labels, retrieval defaults and the prompt template to change. An empty label value removes the label."""

    model_id: str
    display_name: str | None = None
    description: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    retrieval: RetrievalOverrides | None = None
    prompt_template: str | None = None


@dataclass(frozen=True, slots=True)
class CreateFineTunedModel:
    """A fine-tuning to start. Exactly one of `dataset_id` and `inline_records` (JSONL lines) is set."""

    display_name: str
    base_model: str
    technique: Technique | None
    parameters: ParametersRequest
    description: str = ""
    model_id: str = ""
    dataset_id: str = ""
    inline_records: Sequence[bytes] = ()
    eval_dataset_id: str = ""
    eval_fraction: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""
    validate_only: bool = False
    warm_start_from: VersionReference | None = None


@dataclass(frozen=True, slots=True)
class CreateRagModel:
    """A RAG model to make, with its first documents."""

    display_name: str
    generator_model_id: str
    embedding_model: str
    retrieval: RetrievalOverrides
    embedding_backend: EmbeddingBackend | None = None
    max_chunk_tokens: int | None = None
    overlap_tokens: int | None = None
    description: str = ""
    documents: Sequence[NewDocument] = ()
    prompt_template: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class ReindexModel:
    """An index to build anew. An empty embedding model and None take the model's own."""

    model_id: str
    embedding_model: str = ""
    max_chunk_tokens: int | None = None
    overlap_tokens: int | None = None
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class AddDocuments:
    """Documents to add to a RAG model."""

    model_id: str
    documents: Sequence[NewDocument]
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class UploadDocument:
    """What goes with a document's file. `metadata` None: not given."""

    model_id: str
    title: str = ""
    source_uri: str = ""
    metadata: Mapping[str, MetadataValue] | None = None
    document_id: str = ""
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class ImportDocument:
    """A file to import as a document. `metadata` None: not given."""

    model_id: str
    uri: str
    title: str = ""
    metadata: Mapping[str, MetadataValue] | None = None
    document_id: str = ""
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class UploadDataset:
    """What goes with an uploaded file."""

    display_name: str
    format: DatasetFormat | None = None
    request_id: str = ""
    validate_only: bool = False
    record_kind: RecordKind | None = None


@dataclass(frozen=True, slots=True)
class ImportDataset:
    """A file to import."""

    display_name: str
    uri: str
    format: DatasetFormat | None = None
    record_kind: RecordKind | None = None
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class PreviewDataset:
    """Records to show: those of `records`, or a page."""

    dataset_id: str
    base_model: str
    records: Sequence[int] = ()
    page_size: int | None = None
    page_token: str = ""
    max_sequence_tokens: int | None = None
    overlong_policy: OverlongPolicy | None = None
    loss_on: LossOn | None = None
    max_tokens_shown: int | None = None


@dataclass(frozen=True, slots=True)
class Generate:
    """A generation. Exactly one of `prompt` and `messages` is set."""

    model_id: str
    parameters: GenerationParameters
    version: int | None = None
    prompt: str | None = None
    messages: Sequence[ChatMessage] = ()
    timeout_seconds: float | None = None
    priority: Priority = Priority.NORMAL
    tools: Sequence[str] = ()
    history: HistoryPolicy = HistoryPolicy.REFUSE
    echo_prompt: bool = False


@dataclass(frozen=True, slots=True)
class CreateBatchGeneration:
    """A dataset whose records are to be answered."""

    model_id: str
    dataset_id: str
    parameters: GenerationParameters
    version: int | None = None
    history: HistoryPolicy = HistoryPolicy.REFUSE
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class Embed:
    """Texts to turn into vectors."""

    embedding_model: str
    texts: Sequence[str]
    role: EmbedRole | None
    backend: EmbeddingBackend | None = None


@dataclass(frozen=True, slots=True)
class Retrieve:
    """A search without generation, with the conversation before it."""

    model_id: str
    query: str
    retrieval: RetrievalOverrides
    messages: Sequence[ChatMessage] = ()


@dataclass(frozen=True, slots=True)
class RagGenerate:
    """A question to a RAG model, with the conversation before it."""

    model_id: str
    query: str
    retrieval: RetrievalOverrides
    parameters: GenerationParameters
    messages: Sequence[ChatMessage] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to search, to be compared with others. An empty name: its number."""

    name: str = ""
    retrieval: RetrievalOverrides = RetrievalOverrides()


@dataclass(frozen=True, slots=True)
class EvaluateRetrieval:
    """Queries to measure retrieval by: inline, or of a dataset."""

    model_id: str
    queries: Sequence[RetrievalQuery] = ()
    dataset_id: str = ""
    candidates: Sequence[Candidate] = ()
    k_values: Sequence[int] = ()
    seed: int | None = None
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """A model and the job that makes it, with what may disappoint."""

    model: Model
    job: Job | None
    findings: Sequence[Finding] = ()
