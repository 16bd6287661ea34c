"""What happens in a job: the payloads that the event log stores, and those that a child process sends to its worker.

Each has a `kind`, so that a union of them can be read back from JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from server.domain.documents import DOCUMENT_INVALID, DocumentReading
from server.domain.errors import ErrorData
from server.domain.findings import Finding
from server.domain.jobs import BatchCounters, FailureReason, IndexCounters, JobState
from server.domain.rag_indexes import MeasuredSpace
from server.domain.retrieval import Chunk


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The job moved to another state; `reason` says why in a few words."""

    state: JobState
    reason: str = ""
    error: ErrorData | None = None
    from_state: JobState | None = None
    kind: Literal["state_changed"] = "state_changed"


@dataclass(frozen=True, slots=True)
class Started:
    """The child has its data and model ready. For RAG_INDEX total_steps counts documents, for BATCH_GENERATION records."""

    total_steps: int
    resumed_from_step: int = 0
    train_records: int = 0
    eval_records: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0
    kind: Literal["started"] = "started"


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimiser step. `loss` is the mean over the step's trained tokens; `tokens` all real tokens of the job so far."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    eta_seconds: float
    memory_bytes: int
    kind: Literal["step"] = "step"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The loss over the held-out records after `step`; step 0 is the base model."""

    step: int
    loss: float
    tokens: int
    records: int = 0
    duration_seconds: float = 0.0
    best: bool = False
    kind: Literal["evaluation"] = "evaluation"


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is whole on disk. `path` is relative to MODEL_STORAGE_PATH; `best`: its evaluation was the best so far."""

    step: int
    path: str
    size_bytes: int
    best: bool = False
    kind: Literal["checkpoint"] = "checkpoint"


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that the owner of the job should know."""

    code: str
    message: str
    kind: Literal["warning"] = "warning"


@dataclass(frozen=True, slots=True)
class Preparing:
    """The child reads its records and turns them into tokens."""

    records: int
    total_records: int
    tokens: int
    kind: Literal["preparing"] = "preparing"


@dataclass(frozen=True, slots=True)
class LengthBucket:
    """How many sequences have at most so many tokens, and more than the bucket before."""

    up_to_tokens: int
    count: int


@dataclass(frozen=True, slots=True)
class DataChecked:
    """The records were read: what is trained, and what was found in them (one finding per code, with its count)."""

    train_sequences: int
    eval_sequences: int
    tokens: int
    trained_tokens: int
    dropped_records: int = 0
    cut_records: int = 0
    lengths: Sequence[LengthBucket] = ()
    findings: Sequence[Finding] = ()
    duration_seconds: float = 0.0
    cached: bool = False
    kind: Literal["data_checked"] = "data_checked"


@dataclass(frozen=True, slots=True)
class Sampled:
    """A fixed prompt was answered, greedily, by the model as it is after `step`."""

    step: int
    prompt: str
    text: str
    kind: Literal["sample"] = "sample"


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """A document of a RAG_INDEX job is committed (or refused: `error`)."""

    document_id: str
    documents_done: int
    documents_total: int
    chunks: int
    error: str = ""
    error_reason: str = DOCUMENT_INVALID
    counters: IndexCounters = IndexCounters()
    kind: Literal["index_progress"] = "index_progress"


@dataclass(frozen=True, slots=True)
class IndexAdvanced:
    """How far a RAG_INDEX job is. From the child: what this attempt has read, cut and embedded; in the log: of all attempts."""

    counters: IndexCounters
    kind: Literal["index_advanced"] = "index_advanced"


@dataclass(frozen=True, slots=True)
class BatchAdvanced:
    """How far a BATCH_GENERATION job is, all attempts together. `eta_seconds` None: not known yet."""

    counters: BatchCounters
    total_records: int
    tokens_per_second: float = 0.0
    eta_seconds: float | None = None
    kind: Literal["batch_advanced"] = "batch_advanced"


LoggedPayload = (
    StateChanged
    | Preparing
    | DataChecked
    | Started
    | StepDone
    | Evaluated
    | CheckpointSaved
    | Sampled
    | Warned
    | IndexProgress
    | IndexAdvanced
    | BatchAdvanced
)


@dataclass(frozen=True, slots=True)
class SpaceFound:
    """Child to worker: the space of all vectors that it will give. Comes before the first of them."""

    measured: MeasuredSpace
    kind: Literal["space_found"] = "space_found"


@dataclass(frozen=True, slots=True)
class DocumentIndexed:
    """Child to worker: a document's chunks and vectors, or why it has none.

    `vectors` is base64 of little-endian float16 [chunks that are not reused, dimension], L2-normalised.
    """

    document_id: str
    chunks: Sequence[Chunk]
    vectors: str
    dimension: int
    error: str = ""
    reading: DocumentReading = DocumentReading()
    kind: Literal["document_indexed"] = "document_indexed"


@dataclass(frozen=True, slots=True)
class Finalizing:
    """Child to worker: the work is done, the result is being written and tried."""

    kind: Literal["finalizing"] = "finalizing"


@dataclass(frozen=True, slots=True)
class Paused:
    """Child to worker: told to pause, it has saved its state (a CheckpointSaved came before) and ends."""

    kind: Literal["paused"] = "paused"


@dataclass(frozen=True, slots=True)
class ResultReady:
    """Child to worker: the result is whole. For RAG_INDEX only the kind matters.

    `checkpoint_step` is the step whose weights the result has; `library_versions` and `template_sha256` are lineage.
    """

    artifact_path: str = ""
    manifest_sha256: str = ""
    size_bytes: int = 0
    base_revision: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    compute_seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int = 0
    checkpoint_step: int = 0
    library_versions: Mapping[str, str] = field(default_factory=dict)
    template_sha256: str = ""
    kind: Literal["result_ready"] = "result_ready"


@dataclass(frozen=True, slots=True)
class Failed:
    """Child to worker: the job cannot succeed by trying again. `message` for a person, `suggestion` what to change."""

    reason: FailureReason
    message: str
    suggestion: str = ""
    kind: Literal["failed"] = "failed"


ChildEvent = (
    Preparing
    | DataChecked
    | Started
    | StepDone
    | Evaluated
    | CheckpointSaved
    | Sampled
    | Warned
    | IndexAdvanced
    | BatchAdvanced
    | SpaceFound
    | DocumentIndexed
    | Finalizing
    | Paused
    | ResultReady
    | Failed
)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's log; `sequence` starts at 1 and has no gap."""

    sequence: int
    time: datetime
    attempt: int
    payload: LoggedPayload
