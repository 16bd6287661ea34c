"""Rows of jobs and their event log, as the api reads and changes them."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, case, false, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.attempts import read_attempts
from server.db.datasets import uses_dataset
from server.db.failures import violated_constraint
from server.db.locked_job import LockedJob
from server.db.models import ERROR, MAX_INTEGER, uses_model
from server.db.tables import IS_ACTIVE, IS_QUEUED, IS_REINDEX, checkpoints, job_events, job_results, jobs
from server.domain.errors import FailedPrecondition, NotFound
from server.domain.estimates import Estimate
from server.domain.events import Evaluated, JobEvent, StateChanged, StepDone
from server.domain.ids import DATASET, JOB, MODEL, is_id
from server.domain.jobs import Attempt, Best, Checkpoint, Job, JobKind, JobResult, JobState, Progress, Usage
from server.domain.specs import BatchSpec, FineTuneSpec, IndexSpec, Spec
from server.services.codec import LOGGED_PAYLOAD, SPEC, Codec
from server.services.ports import JobFilter, Page, TrainingSpeed

PROGRESS = Codec[Progress](Progress)
BEST = Codec[Best | None](Best | None)
ESTIMATE = Codec[Estimate | None](Estimate | None)
_STEP = Codec[StepDone](StepDone)
_EVALUATED = Codec[Evaluated](Evaluated)


class PostgresJobs:
    """The Jobs of one organization, on an open transaction."""

    def __init__(self, connection: AsyncConnection, organization: str) -> None:
        self._connection = connection
        self._organization = organization

    async def insert(self, job: Job) -> None:
        """Add a job and log its first states (VALIDATING, then its own). One that tries another again takes over its checkpoints.

        Raises NotFound where its model or dataset is gone.
        """
        statement = insert(jobs).values(_describe(self._organization, job)).returning(jobs)
        try:
            row = (await self._connection.execute(statement)).one()
        except IntegrityError as error:
            raise _name_missing(error, job) from error
        added = LockedJob(self._connection, row)
        added.log(StateChanged(JobState.VALIDATING))
        if job.state is not JobState.VALIDATING:
            added.move(job.state, job.state_reason, job.error)
        await added.write()
        if job.retry_of_job_id is not None:
            tried = self._of_job(checkpoints, job.retry_of_job_id)
            await self._connection.execute(update(checkpoints).where(*tried).values(job_id=job.job_id))

    async def get(self, job_id: str, *, lock: bool = False) -> Job:
        """Read a job, with its queue position where it is QUEUED. Raises NotFound."""
        if not is_id(job_id, JOB):
            raise NotFound.of("job", job_id)
        if lock:
            await self._lock(job_id)
        row = (await self._connection.execute(select_jobs().where(*self._own(job_id)))).one_or_none()
        if row is None:
            raise NotFound.of("job", job_id)
        return job_from_row(row)

    async def find_queued(self, model_id: str, spec: Spec) -> Job | None:
        """Find a QUEUED job with this very spec and keep it QUEUED until the transaction ends; None also where another is at it."""
        mine = (jobs.c.organization == self._organization, jobs.c.model_id == model_id, IS_QUEUED, jobs.c.spec == SPEC.to_json(spec))
        query = select(jobs.c.job_id).where(*mine).order_by(jobs.c.job_id).limit(1).with_for_update(skip_locked=True)
        job_id = await self._connection.scalar(query)
        return await self.get(job_id) if job_id else None

    async def list(self, where: JobFilter, page: Page) -> Sequence[Job]:
        """List jobs, newest first."""
        conditions = [jobs.c.organization == self._organization]
        conditions += [jobs.c.state == where.state] if where.state else []
        conditions += [jobs.c.kind == where.kind] if where.kind else []
        conditions += _of_model(where.model_id) if where.model_id is not None else []
        conditions += [jobs.c.job_id < page.before_id] if page.before_id is not None else []
        query = select_jobs().where(*conditions).order_by(jobs.c.job_id.desc()).limit(page.size)
        return [job_from_row(row) for row in await self._connection.execute(query)]

    async def change_state(self, job_id: str, state: JobState, reason: str) -> Job:
        """Move the job, log it and notify, in one step.

        Raises NotFound, and FailedPrecondition where the table of transitions forbids it.
        """
        if not is_id(job_id, JOB):
            raise NotFound.of("job", job_id)
        job = LockedJob(self._connection, await self._lock(job_id))
        job.move(state, reason)
        await job.write()
        return await self.get(job_id)

    async def resume(self, job_id: str) -> Job:
        """Move a PAUSED job back to QUEUED, as its next attempt. Raises NotFound, FailedPrecondition for one that is not PAUSED."""
        if not is_id(job_id, JOB):
            raise NotFound.of("job", job_id)
        job = LockedJob(self._connection, await self._lock(job_id))
        if job.state is not JobState.PAUSED:
            raise FailedPrecondition(
                f"The job is {job.state.value}: only a PAUSED one can be resumed.",
                reason="JOB_NOT_PAUSED",
                metadata={"job_id": job_id, "state": job.state.value},
            )
        job.requeue()
        await job.write()
        return await self.get(job_id)

    async def find_retry(self, job_id: str) -> str | None:
        """Give the id of the job that tries this one again, if there is one."""
        if not is_id(job_id, JOB):
            return None
        query = select(jobs.c.job_id).where(jobs.c.organization == self._organization, jobs.c.retry_of_job_id == job_id)
        return await self._connection.scalar(query)

    async def list_attempts(self, job_id: str, before_attempt: int | None, limit: int) -> Sequence[Attempt]:
        """List the attempts at the job and at those that it tries again, latest first, below an attempt's number."""
        if not is_id(job_id, JOB):
            return []
        return await read_attempts(self._connection, self._organization, job_id, before_attempt, limit)

    async def find_reindex(self, model_id: str) -> str | None:
        """Give the id of the job that builds another index of a RAG model, if one is not finished."""
        mine = (jobs.c.organization == self._organization, jobs.c.model_id == model_id)
        return await self._connection.scalar(select(jobs.c.job_id).where(*mine, IS_ACTIVE, IS_REINDEX).limit(1))

    async def list_active(self, *, model_id: str | None = None, dataset_id: str | None = None) -> Sequence[str]:
        """Give the ids of jobs that are not finished and use this model (as result, base or generator) or dataset."""
        uses = []
        if model_id is not None and is_id(model_id, MODEL):
            uses.append(uses_model(self._organization, model_id))
        if dataset_id is not None and is_id(dataset_id, DATASET):
            uses.append(uses_dataset(dataset_id))
        if not uses:
            return []
        query = select(jobs.c.job_id).where(jobs.c.organization == self._organization, IS_ACTIVE, or_(*uses))
        return list(await self._connection.scalars(query.order_by(jobs.c.job_id)))

    async def list_events(self, job_id: str, after_sequence: int, limit: int) -> Sequence[JobEvent]:
        """Read the log in order, without gaps."""
        if not is_id(job_id, JOB) or after_sequence >= MAX_INTEGER:
            return []
        conditions = (*self._of_job(job_events, job_id), job_events.c.sequence > max(0, after_sequence))
        query = select(job_events).where(*conditions).order_by(job_events.c.sequence).limit(limit)
        return [_event_from_row(row) for row in await self._connection.execute(query)]

    async def list_steps(self, job_id: str, max_points: int) -> Sequence[StepDone]:
        """Read the training curve, thinned in the database to at most `max_points` (the last step always among them)."""
        return [_STEP.from_json(payload) for payload in await self._read_curve(job_id, "step", max_points)]

    async def list_evaluations(self, job_id: str, max_points: int) -> Sequence[Evaluated]:
        """Read the evaluations in order, thinned in the same way."""
        return [_EVALUATED.from_json(payload) for payload in await self._read_curve(job_id, "evaluation", max_points)]

    async def _read_curve(self, job_id: str, kind: str, max_points: int) -> Sequence[object]:
        if not is_id(job_id, JOB) or max_points < 1:
            return []
        counted = (
            select(job_events.c.payload, job_events.c.step, func.count().over().label("total"))
            .add_columns((func.row_number().over(order_by=job_events.c.step.desc()) - 1).label("points_to_last"))
            .where(*self._of_job(job_events, job_id), job_events.c.kind == kind, job_events.c.step.is_not(None))
            .subquery("counted")
        )
        # Every n-th one, counted from the last: n is the least that leaves no more than asked.
        every = func.div(counted.c.total + max_points - 1, max_points)
        query = select(counted.c.payload).where(func.mod(counted.c.points_to_last, every) == 0).order_by(counted.c.step)
        return list(await self._connection.scalars(query))

    async def list_checkpoints(self, job_id: str) -> Sequence[Checkpoint]:
        """List the job's checkpoints, latest step first."""
        if not is_id(job_id, JOB):
            return []
        query = select(checkpoints).where(*self._of_job(checkpoints, job_id)).order_by(checkpoints.c.step.desc())
        return [checkpoint_from_row(row) for row in await self._connection.execute(query)]

    async def get_result(self, job_id: str) -> JobResult:
        """Read where a job's result lies. Raises NotFound."""
        await self.get(job_id)
        row = (await self._connection.execute(select(job_results).where(*self._of_job(job_results, job_id)))).one_or_none()
        if row is None:
            raise NotFound.of("result of job", job_id)
        return JobResult(row.artifact_path, row.manifest_sha256)

    async def list_result_paths(self, model_id: str) -> Sequence[str]:
        """Give the paths of the results that this model's jobs have."""
        of_job = (jobs.c.organization == job_results.c.organization, jobs.c.job_id == job_results.c.job_id)
        mine = (jobs.c.organization == self._organization, jobs.c.model_id == model_id)
        return list(await self._connection.scalars(select(job_results.c.artifact_path).where(*of_job, *mine)))

    async def list_speeds(self, limit: int) -> Sequence[TrainingSpeed]:
        """Give how fast the latest fine-tunings that succeeded have trained, newest first."""
        done = (jobs.c.organization == self._organization, jobs.c.state == JobState.SUCCEEDED, jobs.c.kind == JobKind.FINE_TUNE)
        query = select(jobs.c.spec, jobs.c.progress).where(*done).order_by(jobs.c.job_id.desc()).limit(limit)
        found = [(SPEC.from_json(row.spec), PROGRESS.from_json(row.progress)) for row in await self._connection.execute(query)]
        return [TrainingSpeed(spec, done.tokens_per_second) for spec, done in found if isinstance(spec, FineTuneSpec) and done.tokens > 0]

    async def _lock(self, job_id: str) -> Row[Any]:
        row = (await self._connection.execute(select(jobs).where(*self._own(job_id)).with_for_update())).one_or_none()
        if row is None:
            raise NotFound.of("job", job_id)
        return row

    def _own(self, job_id: str) -> tuple[ColumnElement[bool], ...]:
        return self._of_job(jobs, job_id)

    def _of_job(self, table: Any, job_id: str) -> tuple[ColumnElement[bool], ...]:
        return table.c.organization == self._organization, table.c.job_id == job_id


def select_jobs() -> Select[Any]:
    """Select jobs with their queue position and the seconds in which a worker held them, up to now.

    The queue is one for all organizations, and so is the position; index jobs and batch generations have queues of their own.
    """
    ahead = jobs.alias("ahead")
    same_queue = _name_queue(ahead.c.kind) == _name_queue(jobs.c.kind)
    position = select(func.count()).select_from(ahead).where(IS_QUEUED, ahead.c.job_id <= jobs.c.job_id, same_queue).scalar_subquery()
    holding = func.extract("epoch", func.clock_timestamp() - jobs.c.lease_start_time)
    return select(
        jobs,
        case((jobs.c.state == JobState.QUEUED, position)).label("queue_position"),
        (jobs.c.held_seconds + func.coalesce(holding, 0)).label("compute_seconds"),
    )


def _name_queue(kind: ColumnElement[str]) -> ColumnElement[str]:
    return case((kind.in_((JobKind.RAG_INDEX, JobKind.BATCH_GENERATION)), kind), else_="")


def _of_model(model_id: str) -> list[ColumnElement[bool]]:
    """Tell of jobs whether they make or use a model; a base model is used by batch generations alone."""
    if is_id(model_id, MODEL):
        return [jobs.c.model_id == model_id]
    if "\0" in model_id:  # PostgreSQL takes no such text, and no model has such a name
        return [false()]
    return [jobs.c.kind == JobKind.BATCH_GENERATION, jobs.c.model_id.is_(None), jobs.c.base_model == model_id]


def job_from_row(row: Row[Any]) -> Job:
    """Read a row of `select_jobs`."""
    return Job(
        job_id=row.job_id,
        kind=JobKind(row.kind),
        model_id=row.model_id or row.base_model,
        state=JobState(row.state),
        spec=SPEC.from_json(row.spec),
        create_time=row.create_time,
        update_time=row.update_time,
        state_reason=row.state_reason,
        error=ERROR.from_json(row.error),
        progress=PROGRESS.from_json(row.progress),
        best=BEST.from_json(row.best),
        usage=Usage(float(row.compute_seconds), row.tokens, row.peak_memory_bytes, row.artifact_bytes, row.peak_device_memory_bytes),
        attempt=row.attempt,
        queue_position=row.queue_position,
        lease_epoch=row.lease_epoch,
        last_sequence=row.last_sequence,
        last_step=row.last_step,
        start_time=row.start_time,
        end_time=row.end_time,
        estimate=ESTIMATE.from_json(row.estimate),
        retry_of_job_id=row.retry_of_job_id,
    )


def checkpoint_from_row(row: Row[Any]) -> Checkpoint:
    """Read a row of `checkpoints`."""
    return Checkpoint(row.step, row.path, row.size_bytes, row.create_time, row.eval_loss, row.best)


def _event_from_row(row: Row[Any]) -> JobEvent:
    return JobEvent(row.sequence, row.time, row.attempt, LOGGED_PAYLOAD.from_json(row.payload))


def _describe(organization: str, job: Job) -> dict[str, Any]:
    spec = job.spec
    return {
        "organization": organization,
        "job_id": job.job_id,
        "kind": job.kind,
        "model_id": job.model_id if is_id(job.model_id, MODEL) else None,
        "state": JobState.VALIDATING,
        "state_reason": "",
        "spec": SPEC.to_json(job.spec),
        "base_model": None if isinstance(spec, IndexSpec) else spec.base_model,
        "dataset_id": (spec.dataset_id or None) if isinstance(spec, FineTuneSpec | BatchSpec) else None,
        "eval_dataset_id": (spec.eval_dataset_id or None) if isinstance(spec, FineTuneSpec) else None,
        "progress": PROGRESS.to_json(job.progress),
        "best": BEST.to_json(job.best),
        "held_seconds": 0.0,
        "tokens": 0,
        "peak_memory_bytes": 0,
        "artifact_bytes": 0,
        "attempt": job.attempt,
        "crashes": 0,
        "last_sequence": 0,
        "last_step": 0,
        "lease_epoch": 0,
        "create_time": job.create_time,
        "update_time": job.update_time,
        "estimate": ESTIMATE.to_json(job.estimate),
        "retry_of_job_id": job.retry_of_job_id,
    }


def _name_missing(error: IntegrityError, job: Job) -> Exception:
    spec = job.spec
    constraint = violated_constraint(error)
    if constraint == "jobs_model":
        return NotFound.of("model", job.model_id)
    if isinstance(spec, FineTuneSpec | BatchSpec) and constraint == "jobs_dataset_id":
        return NotFound.of("dataset", spec.dataset_id)
    if isinstance(spec, FineTuneSpec) and constraint == "jobs_eval_dataset_id":
        return NotFound.of("dataset", spec.eval_dataset_id or "")
    return error
