"""What a worker needs from outside: the queue of jobs, over all organizations, under leases."""

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.domain.documents import DocumentReading
from server.domain.errors import ErrorData
from server.domain.events import LoggedPayload, ResultReady
from server.domain.jobs import Checkpoint, FailureReason, Job, JobState
from server.domain.models import ModelVersion
from server.domain.orders import DatasetFile, StagedDocument
from server.domain.rag_indexes import MeasuredSpace
from server.domain.retrieval import Chunk


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's hold on a job: every write names the epoch and fails with LeaseLost when another worker has a newer one."""

    organization: str
    job_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed job: STARTING, leased, with the checkpoint row to go on from."""

    lease: Lease
    job: Job
    checkpoint: Checkpoint | None
    dataset: DatasetFile | None = None
    eval_dataset: DatasetFile | None = None
    best_checkpoint: Checkpoint | None = None
    # Of an export or a batch generation the version, of a warm start the version that it starts from.
    version: ModelVersion | None = None
    # Of an index job: the fingerprint of its index's space, where that was calibrated.
    calibrated_fingerprint: str = ""
    # All that are kept, by their steps: of a batch generation its parts.
    checkpoints: Sequence[Checkpoint] = ()


@dataclass(frozen=True, slots=True)
class ClaimLimits:
    """How many jobs may be held over all workers, by kind of work."""

    training_jobs: int
    index_jobs: int
    batch_jobs: int


class JobQueue(Protocol):
    """The job machine as a worker uses it, over all organizations. Time is the database's. All but claim and reap raise LeaseLost."""

    async def claim(self, worker_id: str, limits: ClaimLimits, lease_seconds: float) -> Claim | None:
        """Take the oldest QUEUED job that the limits allow (SKIP LOCKED), raise its epoch, move it to STARTING."""

    async def heartbeat(self, lease: Lease, lease_seconds: float) -> JobState:
        """Renew the lease and bring back the state that the api may have set: CANCELLING or PAUSING mean stop."""

    async def append(self, lease: Lease, payloads: Sequence[LoggedPayload]) -> None:
        """Log events; steps that the log has already are left out. Updates progress, best and usage in the same transaction."""

    async def change_state(self, lease: Lease, state: JobState, reason: str) -> None:
        """Move the job and log it. A job that is CANCELLING stays so for any state but CANCELLED (no error: heartbeat tells)."""

    async def record_checkpoint(self, lease: Lease, checkpoint: Checkpoint, keep: int) -> Sequence[Checkpoint]:
        """Add the row and its event; drop all rows but the latest `keep` and the best, and give the dropped ones for their files."""

    def read_pending_documents(self, lease: Lease) -> AsyncIterator[StagedDocument]:
        """Stream the contents of the model's documents that wait to be indexed."""

    async def commit_document(
        self,
        lease: Lease,
        document_id: str,
        chunks: Sequence[Chunk],
        vectors: bytes,
        dimension: int,
        error: str,
        total: int,
        reading: DocumentReading = ...,
        space: MeasuredSpace | None = None,
    ) -> Sequence[str]:
        """Replace a document's content, chunks and vectors (float16, [chunks, dimension]), or store `error`; log progress.

        `vectors` leaves out the chunks that `reading` says are reused; all are in `space`, which the first commit fixes for the index.
        Gives files that no row names any more. Raises FailedPrecondition for another space.
        """

    async def complete(self, lease: Lease, result: ResultReady) -> JobState:
        """In one transaction: SUCCEEDED, and what the job made: a version, an export, a result, an index that answers; its model READY.

        CANCELLING where the job was cancelled meanwhile: nothing was written. QUEUED for another round where documents changed since the
        index that is built anew got them.
        """

    async def fail(self, lease: Lease, reason: FailureReason, error: ErrorData) -> JobState:
        """In one transaction: FAILED with its reason, and the model FAILED where it has no version yet. Gives the state reached.

        A job that is CANCELLING becomes CANCELLED instead.
        """

    async def interrupt(
        self, lease: Lease, reason: str, max_attempts: int | None, failure: FailureReason = FailureReason.CRASH_LOOP
    ) -> JobState:
        """End an attempt without a result: INTERRUPTED, then QUEUED with attempt + 1. Gives the state reached.

        A CANCELLING job becomes CANCELLED (its model FAILED where it has no version yet), a PAUSING one PAUSED. FAILED with `failure`
        at the `max_attempts`th crash without a checkpoint or document kept in between; None: no crash.
        """

    async def reap(self, max_attempts: int) -> Sequence[str]:
        """Do the same for jobs whose lease ran out (CANCELLING ones become CANCELLED). Gives their ids."""

    async def drop_old_checkpoints(self, max_age_seconds: float) -> None:
        """Forget the checkpoints of jobs that FAILED so long ago: nobody tries those again, and their files become orphans."""

    async def drop_old_results(self, max_age_seconds: float) -> None:
        """Forget the results that were made so long ago; their files become orphans."""

    async def remove_idle_indexes(self) -> Sequence[str]:
        """Remove indexes of RAG models that do not answer and that no job builds, in batches. Gives a line for each."""

    async def list_live_directories(self) -> Collection[str]:
        """Give every artefact, checkpoint, dataset and document path that a row names or a held job may write, for clearing up orphans."""


class VectorTables(Protocol):
    """Gives the vectors of large indexes what makes searching them fast."""

    async def tend(self) -> Sequence[str]:
        """Do whatever is due; give a line for each thing that was done. One worker at a time does it, and may take minutes."""
