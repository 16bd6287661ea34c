"""TrainingService: jobs, their progress, and datasets."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from server.domain.errors import FailedPrecondition
from server.domain.events import StepDone
from server.domain.jobs import Job, JobState, cancelled_from
from server.domain.models import JOB_CANCELLED, ModelState
from server.services.datasets import Datasets
from server.services.paging import close_page, open_page
from server.services.ports import Database, JobFeed, Transaction
from server.services.requests import Listed, ListJobs
from server.services.validation import Violations
from server.services.watching import WatchItem, watch_job

DEFAULT_METRIC_POINTS = 1_000
MAX_METRIC_POINTS = 10_000
METRIC_NAMES = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "eval_loss")


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: (step, value) in order."""

    name: str
    points: Sequence[tuple[int, float]]


class TrainingService:
    """Use cases of jobs; those of datasets are in `datasets`."""

    def __init__(self, database: Database, feed: JobFeed, datasets: Datasets) -> None:
        self._database = database
        self._feed = feed
        self.datasets = datasets

    async def list_jobs(self, organization: str, request: ListJobs) -> Listed[Job]:
        """List jobs, newest first."""
        page = open_page(request.page, request.where)
        async with self._database.transaction(organization) as transaction:
            items = await transaction.jobs.list(request.where, page)
        return close_page(items, page, request.where, lambda job: job.job_id)

    async def get_job(self, organization: str, job_id: str) -> Job:
        """Read a job. Raises NotFound."""
        async with self._database.transaction(organization) as transaction:
            return await transaction.jobs.get(job_id)

    async def cancel_job(self, organization: str, job_id: str) -> Job:
        """Cancel a job; again is harmless. Raises NotFound, FailedPrecondition where it SUCCEEDED or FAILED."""
        async with self._database.transaction(organization) as transaction:
            job = await transaction.jobs.get(job_id, lock=True)
            if job.state in (JobState.SUCCEEDED, JobState.FAILED):
                raise FailedPrecondition(
                    f"The job is finished ({job.state.value}): there is nothing to cancel.",
                    reason="JOB_FINISHED",
                    metadata={"job_id": job_id, "state": job.state.value},
                )
            state = cancelled_from(job.state)
            if state is job.state:
                return job
            cancelled = await transaction.jobs.change_state(job_id, state, "cancelled by the user")
            if cancelled.is_finished:
                await _give_up_model(transaction, job.model_id)
            return cancelled

    async def get_metrics(self, organization: str, job_id: str, names: Sequence[str], max_points: int | None) -> Sequence[Series]:
        """Read the curves of a job, thinned to at most `max_points` each. Raises NotFound, InvalidInput."""
        found = Violations()
        found.number("max_points", max_points, 1, MAX_METRIC_POINTS)
        for place, name in enumerate(names):
            if name not in METRIC_NAMES:
                found.add(f"names[{place}]", f"must be one of {', '.join(METRIC_NAMES)}")
        found.raise_if_any()
        async with self._database.transaction(organization) as transaction:
            await transaction.jobs.get(job_id)
            steps = await transaction.jobs.list_steps(job_id, max_points or DEFAULT_METRIC_POINTS)
            evaluations = await transaction.jobs.list_evaluations(job_id, max_points or DEFAULT_METRIC_POINTS)
        return [
            Series(name, [(e.step, e.loss) for e in evaluations] if name == "eval_loss" else _curve(steps, name))
            for name in names or METRIC_NAMES
        ]

    def watch_job(self, organization: str, job_id: str, after_sequence: int) -> AsyncGenerator[WatchItem, None]:
        """Stream a snapshot, every event after `after_sequence` in order, heartbeats while idle, and the end."""
        return watch_job(self._database, self._feed, organization, job_id, after_sequence)


def _curve(steps: Sequence[StepDone], name: str) -> list[tuple[int, float]]:
    return [(step.step, float(getattr(step, name))) for step in steps]


async def _give_up_model(transaction: Transaction, model_id: str) -> None:
    """A model whose only job was cancelled before it began will never be READY: say so."""
    model = await transaction.models.get(model_id, lock=True)
    if model.state is ModelState.CREATING:
        await transaction.models.save(replace(model, state=ModelState.FAILED, error=JOB_CANCELLED))
