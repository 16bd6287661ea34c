"""What a caller may do to a job: cancel, pause, resume and retry it. The worker hears of it by the job's row."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from server.domain.errors import FailedPrecondition, NotFound
from server.domain.ids import JOB, MODEL, is_id, new_id
from server.domain.jobs import Best, Checkpoint, Job, JobKind, JobState, cancelled_from, paused_from
from server.domain.models import JOB_CANCELLED, Model, ModelState
from server.domain.specs import BatchSpec, ExportSpec, FineTuneSpec, IndexSpec, Spec, VersionReference
from server.services.ports import Database, Files, Transaction

# Evaluations looked at for the best one that a retry goes on from.
_MAX_EVALUATIONS = 100_000
_PAUSABLE = (JobKind.FINE_TUNE, JobKind.BATCH_GENERATION)


class JobControl:
    """The use cases CancelTrainingJob, PauseTrainingJob, ResumeTrainingJob and RetryTrainingJob."""

    def __init__(self, database: Database, files: Files) -> None:
        self._database = database
        self._files = files

    async def cancel(self, organization: str, job_id: str) -> Job:
        """Cancel a job; again is harmless. Raises NotFound, FailedPrecondition where it SUCCEEDED or FAILED."""
        kept: Sequence[Checkpoint] = ()
        async with self._database.transaction(organization) as transaction:
            job = await transaction.jobs.get(job_id, lock=True)
            if job.state in (JobState.SUCCEEDED, JobState.FAILED):
                raise _refuse(job, "JOB_FINISHED", "is finished: there is nothing to cancel")
            state = cancelled_from(job.state)
            if state is job.state:
                return job
            if state is JobState.CANCELLED:
                # No worker holds it: nobody else would remove what it saved.
                kept = await transaction.jobs.list_checkpoints(job_id)
            cancelled = await transaction.jobs.change_state(job_id, state, "cancelled by the user")
            if cancelled.is_finished:
                await _give_up_model(transaction, job)
        for checkpoint in kept:
            await self._files.delete_tree(checkpoint.path)
        return cancelled

    async def pause(self, organization: str, job_id: str) -> Job:
        """Pause a fine-tuning or a batch generation; again is harmless.

        Raises NotFound, FailedPrecondition for what cannot be paused, or not any more.
        """
        async with self._database.transaction(organization) as transaction:
            job = await transaction.jobs.get(job_id, lock=True)
            if job.kind not in _PAUSABLE:
                raise _refuse(job, "JOB_CANNOT_PAUSE", f"is of kind {job.kind.value}: only {' and '.join(_PAUSABLE)} can be paused")
            state = paused_from(job.state)
            if state is None:
                ended = "is finished" if job.is_finished else "cannot be paused any more"
                raise _refuse(job, "JOB_FINISHED" if job.is_finished else "JOB_STATE_FORBIDS", f"{ended}: there is nothing to pause")
            return job if state is job.state else await transaction.jobs.change_state(job_id, state, "paused by the user")

    async def resume(self, organization: str, job_id: str) -> Job:
        """Let a paused job wait for a worker again. Raises NotFound, FailedPrecondition where it is not PAUSED."""
        async with self._database.transaction(organization) as transaction:
            return await transaction.jobs.resume(job_id)

    async def retry(self, organization: str, job_id: str) -> Job:
        """Store a job that does the same again; give that one. Raises NotFound, FailedPrecondition for a job that cannot be retried."""
        async with self._database.transaction(organization) as transaction:
            # The model first, as who deletes it does. What it has, its versions and datasets, stays until this is committed.
            model = await _lock_model(transaction, (await transaction.jobs.get(job_id)).model_id)
            job = await transaction.jobs.get(job_id, lock=True)
            if job.state not in (JobState.FAILED, JobState.CANCELLED):
                raise _refuse(job, "JOB_CANNOT_RETRY", "cannot be retried: only one that FAILED or was CANCELLED can")
            if retry := await transaction.jobs.find_retry(job_id):
                raise _refuse(job, "JOB_RETRIED", f"was retried already: see {retry}", retry_job_id=retry)
            await _demand_inputs(transaction, job)
            await _revive_model(transaction, model, job)
            again = _repeat(job, await _renew_spec(transaction, model, job.spec), await _find_best(transaction, job))
            await transaction.jobs.insert(again)
            return await transaction.jobs.get(again.job_id)


async def _lock_model(transaction: Transaction, model_id: str) -> Model | None:
    """Lock a job's model; None where that is a base model."""
    return await transaction.models.get(model_id, lock=True) if is_id(model_id, MODEL) else None


def _refuse(job: Job, reason: str, what: str, **more: str) -> FailedPrecondition:
    metadata = {"job_id": job.job_id, "state": job.state.value, **more}
    return FailedPrecondition(f"The job ({job.state.value}) {what}.", reason=reason, metadata=metadata)


def _repeat(job: Job, spec: Spec, best: Best | None) -> Job:
    now = datetime.now(UTC)
    return Job(
        job_id=new_id(JOB),
        kind=job.kind,
        model_id=job.model_id,
        state=JobState.QUEUED,
        spec=spec,
        create_time=now,
        update_time=now,
        best=best,
        attempt=job.attempt + 1,
        estimate=job.estimate,
        retry_of_job_id=job.job_id,
    )


async def _find_best(transaction: Transaction, job: Job) -> Best | None:
    """Give the best evaluation up to the checkpoint that a retry goes on from: what came after it will be evaluated again."""
    checkpoints = await transaction.jobs.list_checkpoints(job.job_id)
    if not checkpoints or job.best is None:
        return None
    if job.best.step <= checkpoints[0].step:
        return job.best
    evaluations = await transaction.jobs.list_evaluations(job.job_id, _MAX_EVALUATIONS)
    kept = [Best(each.step, each.loss) for each in evaluations if each.step <= checkpoints[0].step]
    return min(kept, key=lambda best: best.eval_loss, default=None)


async def _demand_inputs(transaction: Transaction, job: Job) -> None:
    """Demand what the job works on. Raises FailedPrecondition for what was deleted since."""
    try:
        match job.spec:
            case FineTuneSpec() as spec:
                for dataset_id in filter(None, (spec.dataset_id, spec.eval_dataset_id)):
                    await transaction.datasets.get(dataset_id)
                if isinstance(spec.warm_start_from, VersionReference):
                    await transaction.models.get_version(spec.warm_start_from.model_id, spec.warm_start_from.version or 0)
            case BatchSpec() as spec:
                await transaction.datasets.get(spec.dataset_id)
                if spec.version is not None:
                    await transaction.models.get_version(job.model_id, spec.version)
            case ExportSpec(version=version):
                await transaction.models.get_version(job.model_id, version)
            case IndexSpec(is_reindex=True):
                if running := await transaction.jobs.find_reindex(job.model_id):
                    raise _refuse(job, "REINDEX_RUNNING", f"cannot be retried while {running} builds the model's index anew")
            case IndexSpec():
                if not await transaction.staged.is_any_waiting(job.model_id):
                    raise _refuse(job, "NOTHING_TO_RETRY", "has no document left to index: add those that failed again")
    except NotFound as error:
        raise _refuse(job, "JOB_INPUT_GONE", f"cannot be retried, for what it works on was deleted: {str(error).rstrip('.')}") from error


async def _renew_spec(transaction: Transaction, model: Model | None, spec: Spec) -> Spec:
    """Give what the job is to do now: what was built of an index is gone, and another index may answer by now."""
    if not isinstance(spec, IndexSpec) or model is None or model.rag is None:
        return spec
    if spec.is_reindex:
        return replace(spec, index_number=await transaction.models.add_index(model.model_id, spec.embedding_model, spec.chunking))
    return IndexSpec(model.rag.embedding_model, model.rag.chunking, model.rag.index_number, model.rag.embedding_backend)


async def _revive_model(transaction: Transaction, model: Model | None, job: Job) -> None:
    """A model that FAILED with the job comes to be again; one that serves goes on serving."""
    if model is None:
        return
    if model.state is ModelState.DELETING:
        raise _refuse(job, "MODEL_DELETING", "cannot be retried: its model is being deleted")
    if model.state is ModelState.FAILED and job.kind.makes_model:
        await transaction.models.save(replace(model, state=ModelState.CREATING, error=None))


async def _give_up_model(transaction: Transaction, job: Job) -> None:
    """A model whose only job was cancelled before it began will never be READY: say so."""
    if not job.kind.makes_model:
        return
    model = await transaction.models.get(job.model_id, lock=True)
    if model.state is ModelState.CREATING:
        await transaction.models.save(replace(model, state=ModelState.FAILED, error=JOB_CANCELLED))
