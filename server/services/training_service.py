"""TrainingService: jobs, their progress, and datasets."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from server.domain.events import JobEvent, StepDone
from server.domain.jobs import Attempt, Checkpoint, Job
from server.services.datasets import Datasets
from server.services.job_control import JobControl
from server.services.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, close_page, open_numbered_page, open_page
from server.services.ports import Database, JobFeed
from server.services.requests import Listed, ListJobs, PageRequest
from server.services.validation import MAX_SEQUENCE, Violations
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
    """Use cases of jobs: reading and watching them. Those that change jobs are in `control`, those of datasets in `datasets`."""

    def __init__(self, database: Database, feed: JobFeed, datasets: Datasets, control: JobControl) -> None:
        self._database = database
        self._feed = feed
        self.datasets = datasets
        self.control = control

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

    async def list_attempts(self, organization: str, job_id: str, request: PageRequest) -> Listed[Attempt]:
        """List the attempts at a job and at those that it tries again, latest first. Raises NotFound, InvalidInput."""
        filters = ("attempts", job_id)
        page, before = open_numbered_page(request, filters)
        async with self._database.transaction(organization) as transaction:
            await transaction.jobs.get(job_id)
            items = await transaction.jobs.list_attempts(job_id, before, page.size)
        return close_page(items, page, filters, lambda attempt: str(attempt.attempt))

    async def list_events(
        self, organization: str, job_id: str, after_sequence: int, page_size: int | None
    ) -> tuple[Sequence[JobEvent], int | None]:
        """Read a page of the log, and the sequence number after which the next one begins. Raises NotFound, InvalidInput."""
        found = Violations()
        found.number("after_sequence", after_sequence, 0, MAX_SEQUENCE)
        found.number("page_size", page_size, 1, MAX_PAGE_SIZE)
        found.raise_if_any()
        size = page_size or DEFAULT_PAGE_SIZE
        async with self._database.transaction(organization) as transaction:
            await transaction.jobs.get(job_id)
            events = await transaction.jobs.list_events(job_id, after_sequence, size + 1)
        return events[:size], events[size - 1].sequence if len(events) > size else None

    async def list_checkpoints(self, organization: str, job_id: str) -> Sequence[Checkpoint]:
        """List what a job could go on from, latest step first. Raises NotFound."""
        async with self._database.transaction(organization) as transaction:
            await transaction.jobs.get(job_id)
            return await transaction.jobs.list_checkpoints(job_id)

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
