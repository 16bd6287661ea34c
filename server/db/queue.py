"""The job machine as a worker uses it, over all organizations. Time is the database's; a job's epoch fences every write."""

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import replace

from sqlalchemy import ColumnElement, Text, cast, delete, func, select, union_all, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db import settlement
from server.db.claims import lease_end, take_job
from server.db.database import PostgresDatabase
from server.db.document_commits import DocumentKey, commit_document
from server.db.document_tables import IndexKey, documents, staged_documents
from server.db.index_removal import remove_idle_indexes
from server.db.jobs import PROGRESS, checkpoint_from_row
from server.db.locked_job import LockedJob, lease_lost
from server.db.progress import record_payloads
from server.db.rag_indexes import fix_dimension, fix_space
from server.db.reindexing import DOCUMENTS_CHANGED, commit_reindexed, read_lacking, switch_index
from server.db.staging import read_staged
from server.db.tables import (
    IS_HELD,
    checkpoints,
    datasets,
    job_results,
    jobs,
    model_exports,
    model_versions,
)
from server.domain.documents import DocumentReading
from server.domain.errors import ErrorData
from server.domain.events import CheckpointSaved, IndexProgress, LoggedPayload, ResultReady
from server.domain.jobs import Checkpoint, FailureReason, IndexCounters, JobKind, JobState, may_follow
from server.domain.orders import StagedDocument
from server.domain.rag_indexes import MeasuredSpace
from server.domain.retrieval import Chunk
from server.domain.specs import IndexSpec
from server.services.codec import Codec
from server.services.job_queue import Claim, ClaimLimits, Lease

MAX_REAPED = 100  # jobs in one transaction
DOCUMENTS_PER_READ = 16
_INDEX = Codec[IndexSpec](IndexSpec)
_READING = DocumentReading()


class PostgresJobQueue:
    """The JobQueue on PostgreSQL."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database

    async def claim(self, worker_id: str, limits: ClaimLimits, lease_seconds: float) -> Claim | None:
        """Take the oldest QUEUED job that the limits allow (SKIP LOCKED), raise its epoch, move it to STARTING."""
        async with self._database.begin() as connection:
            return await take_job(connection, worker_id, limits, lease_seconds)

    async def heartbeat(self, lease: Lease, lease_seconds: float) -> JobState:
        """Renew the lease and bring back the state that the api may have set: CANCELLING or PAUSING mean stop. Raises LeaseLost."""
        renewed = update(jobs).where(*_held_under(lease)).values(lease_end_time=lease_end(lease_seconds)).returning(jobs.c.state)
        async with self._database.begin() as connection:
            state = await connection.scalar(renewed)
        if state is None:
            raise lease_lost(lease.job_id)
        return JobState(state)

    async def append(self, lease: Lease, payloads: Sequence[LoggedPayload]) -> None:
        """Log events; steps that the log has already are left out. Updates progress, best and usage in the same transaction.

        Raises LeaseLost. State changes have methods of their own.
        """
        async with self._database.begin() as connection:
            job = await _lock(connection, lease)
            await record_payloads(connection, job, payloads)
            if job.is_changed:
                await job.write()

    async def change_state(self, lease: Lease, state: JobState, reason: str) -> None:
        """Move the job and log it. A job that is to stop stays so where the table of transitions says so (no error: heartbeat tells).

        Raises LeaseLost, and FailedPrecondition for a forbidden move of a job that nobody stops.
        """
        async with self._database.begin() as connection:
            job = await _lock(connection, lease)
            if job.state in (JobState.CANCELLING, JobState.PAUSING) and not may_follow(job.state, state):
                return
            job.move(state, reason)
            await job.write()

    async def record_checkpoint(self, lease: Lease, checkpoint: Checkpoint, keep: int) -> Sequence[Checkpoint]:
        """Add the row and its event; drop all rows but the latest `keep` and the best, and give the dropped ones for their files.

        Raises LeaseLost.
        """
        key = {"organization": lease.organization, "job_id": lease.job_id, "step": checkpoint.step}
        values = {"path": checkpoint.path, "size_bytes": checkpoint.size_bytes, "eval_loss": checkpoint.eval_loss}
        values |= {"best": checkpoint.best, "create_time": func.clock_timestamp()}
        async with self._database.begin() as connection:
            job = await _lock(connection, lease)
            replaced = await connection.execute(select(checkpoints).where(*(checkpoints.c[name] == value for name, value in key.items())))
            dropped = [checkpoint_from_row(row) for row in replaced if row.path != checkpoint.path]
            if checkpoint.best:
                of_job = (checkpoints.c.organization == lease.organization, checkpoints.c.job_id == lease.job_id)
                await connection.execute(update(checkpoints).where(*of_job, checkpoints.c.best).values(best=False))
            await connection.execute(insert(checkpoints).values(key | values).on_conflict_do_update(index_elements=list(key), set_=values))
            dropped += await _drop_checkpoints(connection, lease, max(1, keep))
            await record_payloads(
                connection, job, [CheckpointSaved(checkpoint.step, checkpoint.path, checkpoint.size_bytes, checkpoint.best)]
            )
            # The job got further: what crashed before does not count any more.
            job.set(crashes=0)
            await job.write()
            return dropped

    async def read_pending_documents(self, lease: Lease) -> AsyncIterator[StagedDocument]:
        """Stream the contents of the model's documents that wait, or that an index in the making lacks, oldest first.

        No transaction is open between two batches. Raises LeaseLost.
        """
        last_id = ""
        while True:
            async with self._database.begin() as connection:
                row = (await connection.execute(select(jobs.c.model_id, jobs.c.spec).where(*_held_under(lease)))).one_or_none()
                if row is None:
                    raise lease_lost(lease.job_id)
                read = read_lacking if _INDEX.from_json(row.spec).is_reindex else read_staged
                staged = await read(connection, _find_index(lease.organization, row.model_id, row.spec), last_id, DOCUMENTS_PER_READ)
            for document in staged:
                yield document
            if len(staged) < DOCUMENTS_PER_READ:
                return
            last_id = staged[-1].document_id

    async def commit_document(
        self,
        lease: Lease,
        document_id: str,
        chunks: Sequence[Chunk],
        vectors: bytes,
        dimension: int,
        error: str,
        total: int,
        reading: DocumentReading = _READING,
        space: MeasuredSpace | None = None,
    ) -> Sequence[str]:
        """Replace a document's content, chunks and vectors (float16, [chunks, dimension]), or store `error`; log progress.

        A document that was deleted meanwhile counts as done. Gives files that no row names any more. Raises LeaseLost, InvalidInput,
        and FailedPrecondition where the index's other vectors are in another space, or have another dimension.
        """
        async with self._database.begin() as connection:
            job = await _lock(connection, lease)
            index = _find_index(lease.organization, job.row.model_id, job.row.spec)
            key = DocumentKey(index, document_id)
            stored = () if error else chunks
            if stored:
                await fix_dimension(connection, index, dimension)
            if stored and space is not None:
                await fix_space(connection, index, space)
            commit = commit_reindexed if _INDEX.from_json(job.row.spec).is_reindex else commit_document
            committed = await commit(connection, key, stored, vectors if stored else b"", dimension, error, reading)
            if committed.is_settled:
                done = job.row.progress["step"] + 1
                count = len(stored) if committed.is_stored else 0
                known = PROGRESS.from_json(job.row.progress).indexing or IndexCounters()
                counters = replace(
                    reading.counters,
                    committed_documents=done,
                    committed_chunks=known.committed_chunks + count,
                    committed_reused=known.committed_reused + (len(reading.reused) if count else 0),
                )
                progress = IndexProgress(document_id, done, max(total, done), count, committed.said, reading.error_reason, counters)
                await record_payloads(connection, job, [progress])
                job.set(crashes=0)
                await job.write()
            return committed.dropped_paths

    async def complete(self, lease: Lease, result: ResultReady) -> JobState:
        """In one transaction: SUCCEEDED, and what the job made: a version, an export, a result, an index that answers; its model READY.

        CANCELLING where the job was cancelled meanwhile: nothing was written. QUEUED for another round where documents changed since the
        index that is built anew got them. Raises LeaseLost, and FailedPrecondition where the job is not FINALIZING.
        """
        async with self._database.begin() as connection:
            job = await _lock(connection, lease)
            if job.state is JobState.CANCELLING:
                return job.state
            is_reindex = job.row.kind == JobKind.RAG_INDEX and _INDEX.from_json(job.row.spec).is_reindex
            if is_reindex and not await switch_index(connection, job):
                return await settlement.interrupt(connection, job, DOCUMENTS_CHANGED, None)
            await settlement.succeed(connection, job, result)
            return job.state

    async def fail(self, lease: Lease, reason: FailureReason, error: ErrorData) -> JobState:
        """In one transaction: FAILED with its reason, and the model FAILED where it is still CREATING. Gives the state reached.

        A job that is CANCELLING becomes CANCELLED instead. Raises LeaseLost.
        """
        async with self._database.begin() as connection:
            return await settlement.fail(connection, await _lock(connection, lease), reason, error)

    async def interrupt(
        self, lease: Lease, reason: str, max_attempts: int | None, failure: FailureReason = FailureReason.CRASH_LOOP
    ) -> JobState:
        """INTERRUPTED, then QUEUED with attempt + 1; or FAILED with `failure` after so many crashes in a row. Gives the state reached.

        A job that is CANCELLING becomes CANCELLED, a PAUSING one PAUSED. Raises LeaseLost.
        """
        async with self._database.begin() as connection:
            return await settlement.interrupt(connection, await _lock(connection, lease), reason, max_attempts, failure)

    async def reap(self, max_attempts: int) -> Sequence[str]:
        """Do the same for jobs whose lease ran out. Gives their ids."""
        overdue = select(jobs).where(IS_HELD, jobs.c.lease_end_time < func.clock_timestamp()).order_by(jobs.c.job_id)
        async with self._database.begin() as connection:
            rows = (await connection.execute(overdue.limit(MAX_REAPED).with_for_update(skip_locked=True))).all()
            for row in rows:
                await settlement.interrupt(connection, LockedJob(connection, row), "WORKER_LOST", max_attempts)
            return [row.job_id for row in rows]

    async def drop_old_checkpoints(self, max_age_seconds: float) -> None:
        """Forget the checkpoints of jobs that FAILED so long ago: nobody tries those again, and their files become orphans."""
        of_job = (jobs.c.organization == checkpoints.c.organization, jobs.c.job_id == checkpoints.c.job_id)
        ended = jobs.c.end_time < func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, max_age_seconds)
        async with self._database.begin() as connection:
            await connection.execute(delete(checkpoints).where(*of_job, jobs.c.state == JobState.FAILED, ended))

    async def drop_old_results(self, max_age_seconds: float) -> None:
        """Forget the results that were made so long ago; their files become orphans."""
        oldest = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, max_age_seconds)
        async with self._database.begin() as connection:
            await connection.execute(delete(job_results).where(job_results.c.create_time < oldest))

    async def remove_idle_indexes(self) -> Sequence[str]:
        """Remove indexes of RAG models that do not answer and that no job builds, in batches. Gives a line for each."""
        removed = await remove_idle_indexes(self._database)
        return [f"{index.model_id} index {index.index_number}: removed, it answers no more" for index in removed]

    async def list_live_directories(self) -> Collection[str]:
        """Give every artefact, checkpoint, dataset and document path that a row names or a held job may write, for clearing up orphans."""
        model_path = jobs.c.organization + "/models/" + jobs.c.model_id + "/"
        writing = select(model_path + jobs.c.job_id + "-" + cast(jobs.c.lease_epoch, Text)).where(IS_HELD, jobs.c.model_id.is_not(None))
        working = select(jobs.c.organization + "/jobs/" + jobs.c.job_id).where(IS_HELD)
        results = (select(table.c.artifact_path) for table in (model_versions, model_exports, job_results))
        files = (select(table.c.path).where(table.c.path != "") for table in (documents, staged_documents))
        named = (*results, select(checkpoints.c.path), select(datasets.c.path), *files)
        async with self._database.begin() as connection:
            return set(await connection.scalars(union_all(*named, writing, working)))


def _held_under(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return jobs.c.organization == lease.organization, jobs.c.job_id == lease.job_id, jobs.c.lease_epoch == lease.epoch, IS_HELD


async def _lock(connection: AsyncConnection, lease: Lease) -> LockedJob:
    """Lock the job for a write. Raises LeaseLost where its epoch is another or nobody holds it."""
    row = (await connection.execute(select(jobs).where(*_held_under(lease)).with_for_update())).one_or_none()
    if row is None:
        raise lease_lost(lease.job_id)
    return LockedJob(connection, row)


async def _drop_checkpoints(connection: AsyncConnection, lease: Lease, keep: int) -> list[Checkpoint]:
    of_job = (checkpoints.c.organization == lease.organization, checkpoints.c.job_id == lease.job_id)
    older = select(checkpoints.c.step).where(*of_job).order_by(checkpoints.c.step.desc()).offset(keep)
    # The best one is kept beside the latest: the result may be made of it.
    gone = await connection.execute(
        delete(checkpoints).where(*of_job, checkpoints.c.step.in_(older), ~checkpoints.c.best).returning(checkpoints)
    )
    return [checkpoint_from_row(row) for row in gone]


def _find_index(organization: str, model_id: str, spec: object) -> IndexKey:
    """Give the index that a job works for."""
    return IndexKey(organization, model_id, _INDEX.from_json(spec).index_number)
