"""What the use cases need from outside, as Protocols: the database, files, artefacts. job_queue.py and model_ports.py have the others.

Everything that a `Transaction` reads or writes belongs to the organization that it was opened for.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.domain.datasets import Dataset, Inspection, InspectionOrder, InspectionProgress
from server.domain.documents import Document, DocumentFormat, DocumentState, NewDocument
from server.domain.events import Evaluated, JobEvent, StepDone
from server.domain.jobs import Attempt, Checkpoint, Job, JobKind, JobResult, JobState
from server.domain.models import Model, ModelFile, ModelState, ModelType, ModelVersion, RagConfiguration
from server.domain.retrieval import Chunking, MetadataValue, RetrievedChunk, Search
from server.domain.retrieval_evaluation import Span
from server.domain.specs import FineTuneSpec, Spec


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a list, newest first: at most `size` rows with an id below `before_id` (None: from the newest)."""

    size: int
    before_id: str | None = None


@dataclass(frozen=True, slots=True)
class ModelFilter:
    """Which models to list; None takes all."""

    type: ModelType | None = None
    state: ModelState | None = None
    base_model: str | None = None


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to list; None takes all."""

    state: JobState | None = None
    kind: JobKind | None = None
    model_id: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingSpeed:
    """How fast a fine-tuning has trained."""

    spec: FineTuneSpec
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class IssuedRequest:
    """What a request_id was used for: the hash of its body and the ids of what it made."""

    body_sha256: str
    resource_ids: Mapping[str, str]


class Models(Protocol):
    """Rows of models and their versions."""

    async def insert(self, model: Model) -> None:
        """Add a model."""

    async def get(self, model_id: str, *, lock: bool = False) -> Model:
        """Read a model with its counts; `lock` holds the row until the transaction ends. Raises NotFound."""

    async def list(self, where: ModelFilter, page: Page) -> Sequence[Model]:
        """List models, newest first."""

    async def save(self, model: Model) -> None:
        """Write the fields that may change: names, labels, state, error, serving_version, technique, rag. Sets update_time."""

    async def delete(self, model_id: str) -> None:
        """Remove the model with its versions, documents, chunks and finished jobs. Raises NotFound."""

    async def list_users(self, model_id: str) -> Sequence[str]:
        """Give the ids of RAG models that generate with this model."""

    async def read_rag(self, model_id: str) -> tuple[ModelState, RagConfiguration | None]:
        """Read how a model searches and answers, and where; None where it is no RAG model. Raises NotFound."""

    async def add_index(self, model_id: str, embedding_model: str, chunking: Chunking) -> int:
        """Add an index that does not answer yet; give its number. The model's row must be locked."""

    async def get_version(self, model_id: str, version: int) -> ModelVersion:
        """Read one version. Raises NotFound."""

    async def list_versions(self, model_id: str, size: int, before: int | None = None) -> Sequence[ModelVersion]:
        """List the versions with their exports, newest first: at most `size`, below the number `before`."""

    async def list_version_users(self, model_id: str, version: int) -> Sequence[str]:
        """Give the ids of jobs that are not finished and export this version, generate with it or start from it."""

    async def delete_version(self, model_id: str, version: int) -> None:
        """Remove a version with its exports. Raises NotFound."""


class Jobs(Protocol):
    """Rows of jobs and their event log, for the api."""

    async def find_queued(self, model_id: str, spec: Spec) -> Job | None:
        """Find a QUEUED job with this very spec and keep it QUEUED until the transaction ends; None also where another is at it."""

    async def insert(self, job: Job) -> None:
        """Add a job and log its first states (VALIDATING, then its own). One that tries another again takes over its checkpoints."""

    async def get(self, job_id: str, *, lock: bool = False) -> Job:
        """Read a job, with its queue position where it is QUEUED. Raises NotFound."""

    async def list(self, where: JobFilter, page: Page) -> Sequence[Job]:
        """List jobs, newest first."""

    async def change_state(self, job_id: str, state: JobState, reason: str) -> Job:
        """Move the job, log it and notify, in one step. Raises FailedPrecondition where the table of transitions forbids it."""

    async def resume(self, job_id: str) -> Job:
        """Move a PAUSED job back to QUEUED, as its next attempt. Raises FailedPrecondition for one that is not PAUSED."""

    async def find_retry(self, job_id: str) -> str | None:
        """Give the id of the job that tries this one again, if there is one."""

    async def find_reindex(self, model_id: str) -> str | None:
        """Give the id of the job that builds another index of a RAG model, if one is not finished."""

    async def list_attempts(self, job_id: str, before_attempt: int | None, limit: int) -> Sequence[Attempt]:
        """List the attempts at the job and at those that it tries again, latest first, below an attempt's number."""

    async def list_active(self, *, model_id: str | None = None, dataset_id: str | None = None) -> Sequence[str]:
        """Give the ids of jobs that are not finished and use this model (as result, base or generator) or dataset."""

    async def list_events(self, job_id: str, after_sequence: int, limit: int) -> Sequence[JobEvent]:
        """Read the log in order, without gaps."""

    async def list_steps(self, job_id: str, max_points: int) -> Sequence[StepDone]:
        """Read the training curve, thinned in the database to at most `max_points` (the last step always among them)."""

    async def list_evaluations(self, job_id: str, max_points: int) -> Sequence[Evaluated]:
        """Read the evaluations in order of their steps, thinned likewise."""

    async def list_checkpoints(self, job_id: str) -> Sequence[Checkpoint]:
        """List the job's checkpoints, latest step first."""

    async def get_result(self, job_id: str) -> JobResult:
        """Read where a job's result lies. Raises NotFound."""

    async def list_result_paths(self, model_id: str) -> Sequence[str]:
        """Give the paths of the results that this model's jobs have."""

    async def list_speeds(self, limit: int) -> Sequence[TrainingSpeed]:
        """Give how fast the latest fine-tunings that succeeded have trained, newest first."""


class Datasets(Protocol):
    """Rows of datasets."""

    async def insert(self, dataset: Dataset) -> None:
        """Add a dataset."""

    async def get(self, dataset_id: str) -> Dataset:
        """Read a dataset. Raises NotFound."""

    async def list(self, page: Page) -> Sequence[Dataset]:
        """List datasets, newest first."""

    async def delete(self, dataset_id: str) -> None:
        """Remove the row. Raises NotFound."""


@dataclass(frozen=True, slots=True)
class DocumentOriginal:
    """What a document was given as: a file at `path`, or its text. `format` None: a text, or a file that was not read yet."""

    text: str
    path: str
    format: DocumentFormat | None


class Documents(Protocol):
    """Rows of documents with their texts and chunks."""

    async def insert(self, model_id: str, documents: Sequence[tuple[str, NewDocument]], job_id: str = "") -> Sequence[Document]:
        """Add PENDING documents under the given new ids; their contents wait for a job."""

    async def get(self, model_id: str, document_id: str) -> Document:
        """Read a document without its text. Raises NotFound."""

    async def list(self, model_id: str, page: Page, state: DocumentState | None = None) -> Sequence[Document]:
        """List documents, newest first; None takes every state."""

    async def get_original(self, model_id: str, document_id: str) -> DocumentOriginal:
        """Read what a document was given as: its latest content, a text or a file. Raises NotFound."""

    async def get_text(self, model_id: str, document_id: str) -> str:
        """Read the text that is cited; empty while a file was not read yet. Raises NotFound."""

    async def delete(self, model_id: str, document_id: str) -> Sequence[str]:
        """Remove a document with its chunks and vectors, at once; give its files, for others to remove. Raises NotFound."""

    async def search(self, model_id: str, search: Search) -> Sequence[RetrievedChunk]:
        """Give the chunks that a search finds, best first, none below the threshold (`1 - cosine distance`) where vectors are compared.

        Raises PlaceChanged where the search names a place that is not the index's any more.
        """

    async def read_sizes(self, model_id: str, document_ids: Sequence[str]) -> Mapping[str, int]:
        """Give the characters of those of the documents that are indexed."""

    async def find_quotes(self, model_id: str, index_number: int, quotes: Sequence[tuple[str, str]]) -> Sequence[Sequence[Span]]:
        """Give the places of each quote (a document's id, or an empty one for all, and a text) in indexed documents."""

    async def list_unknown_keys(self, model_id: str, keys: Sequence[str]) -> Sequence[str]:
        """Give those of the keys that no indexed document's metadata has; none where no document is indexed."""


@dataclass(frozen=True, slots=True)
class KnownDocument:
    """What a document is as its latest content has it: `sha256` of what was given, `is_waiting` where that is not indexed yet."""

    document_id: str
    state: DocumentState
    title: str
    source_uri: str
    metadata: Mapping[str, MetadataValue]
    sha256: str
    is_waiting: bool = False


class StagedDocuments(Protocol):
    """Contents of documents that wait to be indexed, one of a document at most."""

    async def list_known(self, model_id: str, new: Sequence[NewDocument]) -> Sequence[KnownDocument]:
        """Give the model's documents that any of `new` may be: of the same id, source or content."""

    async def stage(self, model_id: str, document_id: str, new: NewDocument, job_id: str) -> str:
        """Let a content wait for a job, in place of one that waits already; give that one's file, empty where there is none."""

    async def describe(self, model_id: str, document_id: str, new: NewDocument) -> None:
        """Change title, source and metadata of a document whose content stays."""

    async def is_any_waiting(self, model_id: str) -> bool:
        """Tell whether any content of a model waits to be indexed."""


class Requests(Protocol):
    """Which request ids were used, so that a repeated creation answers with its first result."""

    async def find(self, method: str, request_id: str) -> IssuedRequest | None:
        """Read what this id was used for; takes a lock so that two at once cannot both find nothing."""

    async def insert(self, method: str, request_id: str, issued: IssuedRequest) -> None:
        """Remember it."""


class Transaction(Protocol):
    """One unit of work of one organization: committed when its block ends well, else rolled back."""

    models: Models
    jobs: Jobs
    datasets: Datasets
    documents: Documents
    staged: StagedDocuments
    requests: Requests


class Database(Protocol):
    """The database, as the api uses it."""

    def transaction(self, organization: str) -> AbstractAsyncContextManager[Transaction]:
        """Open a unit of work."""

    def reading(self, organization: str) -> AbstractAsyncContextManager[Transaction]:
        """Open one for reading in which each query stands for itself: without the round trips that begin and end a transaction."""


class JobFeed(Protocol):
    """Tells watchers that a job's log has grown. One query serves all watchers of this process."""

    async def wait(self, organization: str, job_id: str, after_sequence: int, timeout_seconds: float) -> bool:
        """Return True once the log of the job is longer than `after_sequence`, False after the timeout."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What was written to disk."""

    size_bytes: int
    sha256: str


class Files(Protocol):
    """Files under MODEL_STORAGE_PATH, by relative path."""

    async def write(self, path: str, data: AsyncIterator[bytes], max_bytes: int) -> StoredFile:
        """Stream to disk, aside and renamed. Raises ResourceExhausted over `max_bytes` or on a full disk; leaves nothing behind."""

    async def fetch(self, path: str) -> Path:
        """Give the place of a file on this machine's disk. Raises NotFound where it is not in remote storage."""

    async def delete_tree(self, path: str) -> None:
        """Remove a file or directory under the storage root, if it is there."""


class Inspector(Protocol):
    """Looks through files of records where a hostile one can do no harm."""

    def inspect(self, order: InspectionOrder) -> AsyncGenerator[InspectionProgress | Inspection, None]:
        """Tell how far it is, and last what the file holds. Closing ends the work."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to import, as a stream. `size_bytes` None: not known."""

    size_bytes: int | None
    pieces: AsyncIterator[bytes]


class DatasetSources(Protocol):
    """Files outside of this service that may be imported."""

    def open(self, uri: str) -> AbstractAsyncContextManager[SourceFile]:
        """Open a file. Raises FailedPrecondition or InvalidInput where it may not be read, NotFound, Unavailable."""


class Artefacts(Protocol):
    """Files of versions and exports, by the artefact's path and the hash of its manifest; bytes come only after their hash was checked.

    All raise ArtefactInvalid, a FailedPrecondition, for what is missing or damaged, naming the file.
    """

    async def list_files(self, path: str, manifest_sha256: str) -> Sequence[ModelFile]:
        """List the files by their paths, without looking at them."""

    def read_file(self, path: str, manifest_sha256: str, name: str) -> AsyncGenerator[bytes, None]:
        """Stream one file in bounded pieces, at least one. Raises NotFound for a name that is not listed."""

    def read_archive(self, path: str, manifest_sha256: str, directory: str) -> AsyncGenerator[bytes, None]:
        """Stream all files as a tar archive with one directory; the same files give the same bytes."""
