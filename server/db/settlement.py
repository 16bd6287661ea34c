"""How a job ends, or goes back to the queue: what becomes of its row, its model and its version, in one transaction."""

from typing import Any

from sqlalchemy import func, insert, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey
from server.db.locked_job import LockedJob
from server.db.rag_indexes import mark_ready
from server.db.tables import job_results, model_exports, model_versions, models
from server.domain.errors import ErrorData
from server.domain.events import ResultReady
from server.domain.jobs import OUT_OF_MEMORY_SUGGESTION, FailureReason, JobKind, JobState
from server.domain.models import JOB_CANCELLED, ModelState
from server.domain.specs import FineTuneSpec, IndexSpec
from server.services.codec import Codec

_ERROR = Codec[ErrorData](ErrorData)
_INDEX = Codec[IndexSpec](IndexSpec)
_FINE_TUNE = Codec[FineTuneSpec](FineTuneSpec)


async def succeed(connection: AsyncConnection, job: LockedJob, result: ResultReady) -> None:
    """Move a FINALIZING job to SUCCEEDED, with what it made. The model of one that makes a version becomes READY and serves it."""
    row = job.row
    job.move(JobState.SUCCEEDED)
    job.set(
        artifact_bytes=result.size_bytes,
        peak_memory_bytes=max(row.peak_memory_bytes, result.peak_memory_bytes),
        peak_device_memory_bytes=max(row.peak_device_memory_bytes, result.peak_device_memory_bytes),
    )
    await job.write()
    if row.kind == JobKind.EXPORT:
        await _insert_export(connection, row, result)
        return
    if row.kind == JobKind.BATCH_GENERATION:
        await _insert_result(connection, row, result)
        return
    own = (models.c.organization == row.organization, models.c.model_id == row.model_id)
    ready: dict[str, Any] = {"state": ModelState.READY, "error": None, "update_time": func.clock_timestamp()}
    if row.kind == JobKind.FINE_TUNE:
        ready["serving_version"] = await _insert_version(connection, row, result)
        ready["technique"] = _FINE_TUNE.from_json(row.spec).technique.family
    elif row.kind == JobKind.RAG_INDEX:
        await mark_ready(connection, IndexKey(row.organization, row.model_id, _INDEX.from_json(row.spec).index_number))
    await connection.execute(update(models).where(*own, models.c.state != ModelState.DELETING).values(ready))


async def _insert_version(connection: AsyncConnection, row: Any, result: ResultReady) -> int:
    own = (models.c.organization == row.organization, models.c.model_id == row.model_id)
    # The model's row numbers the versions of jobs that end at once; a number is never given twice.
    counted = update(models).where(*own).values(last_version=models.c.last_version + 1).returning(models.c.last_version)
    number = (await connection.execute(counted)).scalar_one()
    version = {
        "organization": row.organization,
        "model_id": row.model_id,
        "version": number,
        "job_id": row.job_id,
        "base_model": row.base_model,
        "base_revision": result.base_revision,
        "artifact_path": result.artifact_path,
        "manifest_sha256": result.manifest_sha256,
        "size_bytes": result.size_bytes,
        "metrics": dict(result.metrics),
        "create_time": func.clock_timestamp(),
        "attempt": row.attempt,
        "checkpoint_step": result.checkpoint_step,
        "spec": row.spec,
        "library_versions": dict(result.library_versions),
        "template_sha256": result.template_sha256,
    }
    await connection.execute(insert(model_versions).values(version))
    return int(number)


async def _insert_export(connection: AsyncConnection, row: Any, result: ResultReady) -> None:
    export = {
        "organization": row.organization,
        "model_id": row.model_id,
        "version": row.spec["version"],
        "format": row.spec["format"],
        "job_id": row.job_id,
        "artifact_path": result.artifact_path,
        "manifest_sha256": result.manifest_sha256,
        "size_bytes": result.size_bytes,
        "metrics": dict(result.metrics),
        "create_time": func.clock_timestamp(),
    }
    # The same version may have been exported twice at once: the later result is as good, and the earlier one's files have no row any more.
    key = ("organization", "model_id", "version", "format")
    statement = postgresql.insert(model_exports).values(export)
    await connection.execute(statement.on_conflict_do_update(index_elements=key, set_=export))


async def _insert_result(connection: AsyncConnection, row: Any, result: ResultReady) -> None:
    values = {
        "organization": row.organization,
        "job_id": row.job_id,
        "artifact_path": result.artifact_path,
        "manifest_sha256": result.manifest_sha256,
        "size_bytes": result.size_bytes,
        "create_time": func.clock_timestamp(),
    }
    await connection.execute(insert(job_results).values(values))


async def fail(connection: AsyncConnection, job: LockedJob, reason: FailureReason, error: ErrorData) -> JobState:
    """Move a job to FAILED; to CANCELLED where that was asked for before it failed. Give the state reached."""
    if job.state is JobState.CANCELLING:
        return await _cancel(connection, job)
    job.move(JobState.FAILED, reason.value, error)
    await job.write()
    await _fail_model(connection, job.row, error)
    return job.state


async def _cancel(connection: AsyncConnection, job: LockedJob) -> JobState:
    job.move(JobState.CANCELLED, job.row.state_reason)
    await job.write()
    await _fail_model(connection, job.row, JOB_CANCELLED)
    return job.state


async def interrupt(
    connection: AsyncConnection,
    job: LockedJob,
    reason: str,
    max_attempts: int | None,
    failure: FailureReason = FailureReason.CRASH_LOOP,
) -> JobState:
    """Put a job whose child or worker is gone back into the queue; end it where it was to stop, or crashed too often in a row.

    `max_attempts` None: it was stopped in order, which does not count. `failure` is what too many crashes are called.
    Gives the state reached.
    """
    if job.state is JobState.CANCELLING:
        return await _cancel(connection, job)
    if job.state is JobState.PAUSING:
        job.move(JobState.PAUSED, job.row.state_reason)
        await job.write()
        return job.state
    job.move(JobState.INTERRUPTED, reason)
    crashes = job.row.crashes + (max_attempts is not None)
    job.set(crashes=crashes)
    if max_attempts is not None and crashes >= max_attempts:
        return await fail(connection, job, failure, _crash_loop(failure, crashes, reason))
    job.requeue()
    await job.write()
    return job.state


def _crash_loop(failure: FailureReason, crashes: int, reason: str) -> ErrorData:
    message = f"The job stopped unexpectedly {crashes} times in a row without getting further, last: {reason}"
    metadata = {"crashes": str(crashes)}
    if failure is FailureReason.OUT_OF_MEMORY:
        metadata["suggestion"] = OUT_OF_MEMORY_SUGGESTION
    return ErrorData("ABORTED", failure, message, metadata)


async def _fail_model(connection: AsyncConnection, job: Any, error: ErrorData) -> None:
    """Mark a model FAILED that its job has left CREATING; one that serves already goes on serving."""
    if not JobKind(job.kind).makes_model:
        return
    own = (models.c.organization == job.organization, models.c.model_id == job.model_id, models.c.state == ModelState.CREATING)
    values = {"state": ModelState.FAILED, "error": _ERROR.to_json(error), "update_time": func.clock_timestamp()}
    await connection.execute(update(models).where(*own).values(values))
