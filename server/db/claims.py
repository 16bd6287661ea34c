"""How a worker takes a job: the oldest one that the limits allow, with all that its execution needs from the database."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, false, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.datasets import dataset_file_from_row
from server.db.document_tables import IndexKey, rag_indexes
from server.db.jobs import checkpoint_from_row, job_from_row, select_jobs
from server.db.locked_job import LockedJob
from server.db.models import version_from_row
from server.db.tables import IS_HELD, IS_QUEUED, IS_REINDEX, checkpoints, datasets, jobs, model_versions
from server.domain.jobs import Job, JobKind, JobState
from server.domain.models import ModelVersion
from server.domain.specs import BatchSpec, ExportSpec, FineTuneSpec, IndexSpec, VersionReference
from server.services.job_queue import Claim, ClaimLimits, Lease

CLAIM_LOCK = 0x6D74_636C  # "mtcl": claims come one after the other, so that each counts what the others hold
_INDEX_KINDS = frozenset({JobKind.RAG_INDEX})
_BATCH_KINDS = frozenset({JobKind.BATCH_GENERATION})
_TRAINING_KINDS = frozenset(JobKind) - _INDEX_KINDS - _BATCH_KINDS


async def take_job(connection: AsyncConnection, worker_id: str, limits: ClaimLimits, lease_seconds: float) -> Claim | None:
    """Take the oldest QUEUED job that the limits allow (SKIP LOCKED), raise its epoch, move it to STARTING."""
    if not await connection.scalar(select(exists().select_from(jobs).where(IS_QUEUED))):
        return None
    await connection.execute(select(func.pg_advisory_xact_lock(CLAIM_LOCK)))
    # A statement after the lock sees what the claims before us committed.
    counted = select(jobs.c.kind, IS_REINDEX, func.count()).where(IS_HELD).group_by(jobs.c.kind, IS_REINDEX)
    held = {(JobKind(kind), is_reindex): count for kind, is_reindex, count in await connection.execute(counted)}
    query = select(jobs).where(IS_QUEUED, or_(false(), *_list_free(held, limits))).order_by(jobs.c.job_id).limit(1)
    row = (await connection.execute(query.with_for_update(skip_locked=True))).one_or_none()
    if row is None:
        return None
    job = LockedJob(connection, row)
    job.move(JobState.STARTING)
    now = func.clock_timestamp()
    job.set(lease_epoch=row.lease_epoch + 1, worker_id=worker_id, lease_start_time=now, lease_end_time=lease_end(lease_seconds))
    job.set(start_time=func.coalesce(jobs.c.start_time, now))
    await job.write()
    return await _read_claim(connection, Lease(row.organization, row.job_id, row.lease_epoch + 1))


def lease_end(lease_seconds: float) -> ColumnElement[Any]:
    """Give the end of a lease that begins now, by the database's clock."""
    return func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, lease_seconds)


def _list_free(held: Mapping[tuple[JobKind, bool], int], limits: ClaimLimits) -> list[ColumnElement[bool]]:
    """Give conditions of the jobs for which there is room. What is added to models need not wait for an index that is built anew."""
    free = []
    rooms = (
        (_TRAINING_KINDS, False, limits.training_jobs),
        (_INDEX_KINDS, False, limits.index_jobs),
        (_INDEX_KINDS, True, limits.index_jobs),
        (_BATCH_KINDS, False, limits.batch_jobs),
    )
    for kinds, is_reindex, most in rooms:
        if sum(held.get((kind, is_reindex), 0) for kind in kinds) < most:
            free.append(and_(jobs.c.kind.in_(kinds), IS_REINDEX if is_reindex else ~IS_REINDEX))
    return free


async def _read_claim(connection: AsyncConnection, lease: Lease) -> Claim:
    own = (jobs.c.organization == lease.organization, jobs.c.job_id == lease.job_id)
    row = (await connection.execute(select_jobs().where(*own))).one()
    job = job_from_row(row)
    of_job = (checkpoints.c.organization == lease.organization, checkpoints.c.job_id == lease.job_id)
    kept = [checkpoint_from_row(each) for each in await connection.execute(select(checkpoints).where(*of_job))]
    named = [each for each in (row.dataset_id, row.eval_dataset_id) if each is not None]
    query = select(datasets).where(datasets.c.organization == lease.organization, datasets.c.dataset_id.in_(named))
    files = {each.dataset_id: dataset_file_from_row(each) for each in await connection.execute(query)}
    return Claim(
        lease,
        job,
        max(kept, key=lambda checkpoint: checkpoint.step, default=None),
        files.get(row.dataset_id),
        files.get(row.eval_dataset_id),
        next((checkpoint for checkpoint in kept if checkpoint.best), None),
        await _read_version(connection, lease.organization, job),
        await _read_calibrated(connection, lease.organization, job),
        sorted(kept, key=lambda checkpoint: checkpoint.step),
    )


async def _read_calibrated(connection: AsyncConnection, organization: str, job: Job) -> str:
    if not isinstance(job.spec, IndexSpec):
        return ""
    index = IndexKey(organization, job.model_id, job.spec.index_number)
    query = select(rag_indexes.c.fingerprint).where(*index.rows_of(rag_indexes), rag_indexes.c.calibration.is_not(None))
    return await connection.scalar(query) or ""


async def _read_version(connection: AsyncConnection, organization: str, job: Job) -> ModelVersion | None:
    """Read the version that an export writes, a batch is answered by or a warm start begins with; None where there is none, or no more."""
    match job.spec:
        case ExportSpec(version=int(version)) | BatchSpec(version=int(version)):
            model_id = job.model_id
        case FineTuneSpec(warm_start_from=VersionReference(model_id=model_id, version=int(version))):
            pass
        case _:
            return None
    of_model = (model_versions.c.organization == organization, model_versions.c.model_id == model_id)
    row = (await connection.execute(select(model_versions).where(*of_model, model_versions.c.version == version))).one_or_none()
    return version_from_row(row) if row else None
