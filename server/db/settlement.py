"""How a job ends, or goes back to the queue: what becomes of its row, its model and its version, in one transaction."""

from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.locked_job import LockedJob
from server.db.tables import model_exports, model_versions, models
from server.domain.errors import ErrorData
from server.domain.events import ResultReady
from server.domain.jobs import FailureReason, JobKind, JobState
from server.domain.models import JOB_CANCELLED, ModelState
from server.services.codec import Codec

_ERROR = Codec[ErrorData](ErrorData)


async def succeed(connection: AsyncConnection, job: LockedJob, result: ResultReady) -> None:
    """Move a FINALIZING job to SUCCEEDED, with the model version that it made. The model becomes READY and serves it."""
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
    own = (models.c.organization == row.organization, models.c.model_id == row.model_id)
    ready: dict[str, Any] = {"state": ModelState.READY, "error": None, "update_time": func.clock_timestamp()}
    if row.kind == JobKind.FINE_TUNE:
        # The model's lock numbers the versions of jobs that end at once.
        await connection.execute(select(models.c.model_id).where(*own).with_for_update(key_share=True))
        ready["serving_version"] = await _insert_version(connection, row, result)
    await connection.execute(update(models).where(*own, models.c.state != ModelState.DELETING).values(ready))


async def _insert_version(connection: AsyncConnection, row: Any, result: ResultReady) -> int:
    of_model = (model_versions.c.organization == row.organization, model_versions.c.model_id == row.model_id)
    latest = await connection.scalar(select(func.max(model_versions.c.version)).where(*of_model))
    version = {
        "organization": row.organization,
        "model_id": row.model_id,
        "version": (latest or 0) + 1,
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
    return (latest or 0) + 1


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
    await connection.execute(insert(model_exports).values(export))


async def fail(connection: AsyncConnection, job: LockedJob, reason: FailureReason, error: ErrorData) -> None:
    """Move a job to FAILED; to CANCELLED where that was asked for before it failed."""
    if job.state is JobState.CANCELLING:
        await cancel(connection, job)
        return
    job.move(JobState.FAILED, reason.value, error)
    await job.write()
    await fail_model(connection, job.row.organization, job.row.model_id, error)


async def cancel(connection: AsyncConnection, job: LockedJob) -> None:
    """Move a CANCELLING job to CANCELLED."""
    job.move(JobState.CANCELLED, job.row.state_reason)
    await job.write()
    await fail_model(connection, job.row.organization, job.row.model_id, JOB_CANCELLED)


async def interrupt(connection: AsyncConnection, job: LockedJob, reason: str, max_attempts: int | None) -> JobState:
    """Put a job whose child or worker is gone back into the queue; end it where it was to stop, or crashed too often in a row.

    `max_attempts` None: it was stopped in order, which does not count. Gives the state reached.
    """
    if job.state is JobState.CANCELLING:
        await cancel(connection, job)
        return job.state
    if job.state is JobState.PAUSING:
        job.move(JobState.PAUSED, job.row.state_reason)
        await job.write()
        return job.state
    job.move(JobState.INTERRUPTED, reason)
    attempt, crashes = job.row.attempt, job.row.crashes + (max_attempts is not None)
    job.set(crashes=crashes)
    if max_attempts is not None and crashes >= max_attempts:
        await fail(connection, job, FailureReason.CRASH_LOOP, _crash_loop(crashes, reason))
        return job.state
    job.move(JobState.QUEUED, f"attempt {attempt + 1}")
    job.set(attempt=attempt + 1)
    await job.write()
    return job.state


def _crash_loop(crashes: int, reason: str) -> ErrorData:
    message = f"The job stopped unexpectedly {crashes} times in a row without getting further, last: {reason}"
    return ErrorData("ABORTED", FailureReason.CRASH_LOOP, message, {"crashes": str(crashes)})


async def fail_model(connection: AsyncConnection, organization: str, model_id: str, error: ErrorData) -> None:
    """Mark a model FAILED that its job has left CREATING; one that serves already goes on serving."""
    own = (models.c.organization == organization, models.c.model_id == model_id, models.c.state == ModelState.CREATING)
    values = {"state": ModelState.FAILED, "error": _ERROR.to_json(error), "update_time": func.clock_timestamp()}
    await connection.execute(update(models).where(*own).values(values))
