"""A training job: its states, which may follow which, and the record that PostgreSQL keeps of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from server.domain.errors import ErrorData
from server.domain.estimates import Estimate
from server.domain.specs import Spec

BATCH_RESULT_NAME = "result.jsonl"  # the file in the artefact of a BATCH_GENERATION


class JobKind(StrEnum):
    """What a job makes."""

    FINE_TUNE = "FINE_TUNE"
    RAG_INDEX = "RAG_INDEX"
    EXPORT = "EXPORT"
    BATCH_GENERATION = "BATCH_GENERATION"

    @property
    def makes_model(self) -> bool:
        """Whether the job's model comes to be, or fails, with it; the others only use one."""
        return self in (JobKind.FINE_TUNE, JobKind.RAG_INDEX)


class JobState(StrEnum):
    """Where a job stands; `TRANSITIONS` says what may follow."""

    VALIDATING = "VALIDATING"
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    FINALIZING = "FINALIZING"
    SUCCEEDED = "SUCCEEDED"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    INTERRUPTED = "INTERRUPTED"
    FAILED = "FAILED"


_S = JobState
_STOPS = frozenset({_S.CANCELLING, _S.FAILED, _S.INTERRUPTED})

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    _S.VALIDATING: frozenset({_S.QUEUED, _S.CANCELLED, _S.FAILED}),
    _S.QUEUED: frozenset({_S.STARTING, _S.CANCELLED, _S.FAILED, _S.PAUSED}),
    _S.STARTING: frozenset({_S.RUNNING, _S.PAUSING}) | _STOPS,
    _S.RUNNING: frozenset({_S.FINALIZING, _S.PAUSING}) | _STOPS,
    _S.FINALIZING: frozenset({_S.SUCCEEDED}) | _STOPS,
    _S.PAUSING: frozenset({_S.PAUSED, _S.FINALIZING}) | _STOPS,
    _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLED}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    _S.INTERRUPTED: frozenset({_S.QUEUED, _S.CANCELLED, _S.FAILED}),
    _S.SUCCEEDED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.FAILED: frozenset(),
}

TERMINAL_STATES = frozenset(state for state, following in TRANSITIONS.items() if not following)
# A worker holds the job and a child may be running: these count against the limit and need a live lease.
HELD_STATES = frozenset({_S.STARTING, _S.RUNNING, _S.FINALIZING, _S.PAUSING, _S.CANCELLING})


def may_follow(state: JobState, following: JobState) -> bool:
    """Tell whether a job in `state` may move to `following`."""
    return following in TRANSITIONS[state]


def cancelled_from(state: JobState) -> JobState:
    """Give the state that a cancel leads to: at once where nobody holds the job, else through CANCELLING. Terminal states stay."""
    if state in TERMINAL_STATES or state is JobState.CANCELLING:
        return state
    return JobState.CANCELLING if state in HELD_STATES else JobState.CANCELLED


def paused_from(state: JobState) -> JobState | None:
    """Give the state that a pause leads to: at once where nobody holds the job, else through PAUSING. None where it cannot be paused."""
    if state in (JobState.PAUSING, JobState.PAUSED):
        return state
    if state is JobState.QUEUED:
        return JobState.PAUSED
    return JobState.PAUSING if state in (JobState.STARTING, JobState.RUNNING) else None


class FailureReason(StrEnum):
    """Why a job FAILED, for programs; the message and the suggestion are for people."""

    DATASET_INVALID = "DATASET_INVALID"
    BASE_MODEL_UNAVAILABLE = "BASE_MODEL_UNAVAILABLE"
    EMBEDDING_MODEL_UNAVAILABLE = "EMBEDDING_MODEL_UNAVAILABLE"
    DOCUMENTS_INVALID = "DOCUMENTS_INVALID"
    EMBEDDING_SPACE_CHANGED = "EMBEDDING_SPACE_CHANGED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    LOSS_NOT_FINITE = "LOSS_NOT_FINITE"
    DISK_FULL = "DISK_FULL"
    CRASH_LOOP = "CRASH_LOOP"
    ARTIFACT_INVALID = "ARTIFACT_INVALID"
    INTERNAL = "INTERNAL"


OUT_OF_MEMORY_SUGGESTION = "Lower batch_size or max_sequence_tokens, or take a smaller base model."


class JobFailure(Exception):
    """A job cannot succeed by trying again. `message` is for its owner (no paths, no tracebacks), `suggestion` says what to change."""

    def __init__(self, reason: FailureReason, message: str, suggestion: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.suggestion = suggestion


@dataclass(frozen=True, slots=True)
class IndexCounters:
    """How far the documents of a RAG_INDEX job are; what is read or embedded and not committed is lost with an attempt, and counted off.

    Chunks count as embedded when their vectors are there, computed or reused. The last two: what of the chunks is committed.
    """

    parsed_documents: int = 0
    chunked_chunks: int = 0
    embedded_chunks: int = 0
    reused_chunks: int = 0
    committed_documents: int = 0
    committed_chunks: int = 0
    committed_reused: int = 0

    def begin_attempt(self) -> "IndexCounters":
        """Give what a new attempt begins with."""
        chunks, reused = self.committed_chunks, self.committed_reused
        return IndexCounters(self.committed_documents, chunks, chunks, reused, self.committed_documents, chunks, reused)

    def add(self, other: "IndexCounters") -> "IndexCounters":
        """Give the sums."""
        return IndexCounters(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class BatchCounters:
    """What became of the records of a BATCH_GENERATION job, all attempts together."""

    answered_records: int = 0
    failed_records: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def records(self) -> int:
        """Records that are done, one way or the other."""
        return self.answered_records + self.failed_records

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. For RAG_INDEX a step is a document, for BATCH_GENERATION a record."""

    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    tokens: int = 0
    tokens_per_second: float = 0.0
    eta_seconds: float | None = None
    loss: float | None = None
    indexing: IndexCounters | None = None
    batch: BatchCounters | None = None

    @property
    def fraction(self) -> float:
        """The part that is done, 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far."""

    step: int
    eval_loss: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job consumed over all attempts."""

    compute_seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0
    artifact_bytes: int = 0
    peak_device_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One job as stored. `lease_epoch` is the fencing token; `last_step` the last step in the event log.

    `model_id` is the model that it makes or uses: of a BATCH_GENERATION perhaps a base model, by its name.
    """

    job_id: str
    kind: JobKind
    model_id: str
    state: JobState
    spec: Spec
    create_time: datetime
    update_time: datetime
    state_reason: str = ""
    error: ErrorData | None = None
    progress: Progress = Progress()
    best: Best | None = None
    usage: Usage = Usage()
    attempt: int = 1
    queue_position: int | None = None
    lease_epoch: int = 0
    last_sequence: int = 0
    last_step: int = 0
    start_time: datetime | None = None
    end_time: datetime | None = None
    estimate: Estimate | None = None
    retry_of_job_id: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the job is in a terminal state."""
        return self.state in TERMINAL_STATES


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved point that a job can go on from; of a BATCH_GENERATION the results since the one before.

    `path` is relative to MODEL_STORAGE_PATH.
    """

    step: int
    path: str
    size_bytes: int
    create_time: datetime
    eval_loss: float | None = None
    best: bool = False


@dataclass(frozen=True, slots=True)
class JobResult:
    """Where the file lies that a job has made: an artefact, its path relative to MODEL_STORAGE_PATH, sealed by its manifest."""

    path: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a job. `job_id` may be that of a job which this one tries again."""

    job_id: str
    attempt: int
    state: JobState
    reason: str = ""
    error: ErrorData | None = None
    last_step: int | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
