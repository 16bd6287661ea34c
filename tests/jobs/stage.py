"""What the tests of the worker share: a real database, real workers (in this process or their own), scripted children."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import psutil

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.events import JobEvent, StateChanged, StepDone
from server.domain.jobs import TERMINAL_STATES, Job, JobState
from server.jobs.files import JobFiles
from server.jobs.localchild import LocalExecution
from server.jobs.memory_kills import count_memory_kills
from server.jobs.runner import JobRunner, LeaseTerms
from server.jobs.worker import Worker
from server.services.job_control import JobControl
from server.services.job_queue import ClaimLimits, VectorTables
from server.storage.files import LocalFiles
from tests.db import samples
from tests.jobs.child_program import Script

ROOT = Path(__file__).resolve().parents[2]
# A lease long enough that a machine with much else to do never loses one; SHORT is for tests in which one is lost.
TERMS = LeaseTerms(lease_seconds=30.0, heartbeat_seconds=0.1, max_attempts=3)
SHORT = LeaseTerms(lease_seconds=2.0, heartbeat_seconds=0.1, max_attempts=3)
LIMITS = ClaimLimits(training_jobs=1, index_jobs=1, batch_jobs=1)
_PATIENCE_SECONDS = 60.0


class NoVectorTables:
    """No index is large here."""

    async def tend(self) -> Sequence[str]:
        """Do nothing."""
        return []


def make_worker(
    queue: PostgresJobQueue,
    storage: Path,
    limits: ClaimLimits = LIMITS,
    terms: LeaseTerms = TERMS,
    *,
    pause_grace_seconds: float = 60.0,
    count_kills: Callable[[], int] = count_memory_kills,
    vectors: VectorTables | None = None,
) -> Worker:
    """Put a worker together as the application does, with scripted children."""
    files = JobFiles(storage)
    execution = LocalExecution((sys.executable, "-m", "tests.jobs.child_program", str(storage)), count_kills)
    return Worker(queue, JobRunner(queue, execution, files, terms, pause_grace_seconds), files, limits, terms, vectors or NoVectorTables())


class Stage:
    """A database with jobs, a storage directory, and the script that children follow."""

    def __init__(self, database: PostgresDatabase, database_url: str, storage: Path) -> None:
        self.database = database
        self.database_url = database_url
        self.storage = storage
        self.queue = PostgresJobQueue(database)

    def write_script(self, script: Script) -> None:
        """Say what children do from now on."""
        (self.storage / "script.json").write_text(json.dumps(asdict(script)))

    async def add_job(self, script: Script) -> Job:
        """Queue a training job that follows the script."""
        self.write_script(script)
        return await samples.add_job(self.database, dataset=await samples.add_dataset(self.database))

    @asynccontextmanager
    async def working(
        self,
        limits: ClaimLimits = LIMITS,
        terms: LeaseTerms = TERMS,
        *,
        pause_grace_seconds: float = 60.0,
        count_kills: Callable[[], int] = count_memory_kills,
        queue: PostgresJobQueue | None = None,
    ) -> AsyncIterator[None]:
        """Run a worker of this process, over a queue of its own where one is given."""
        shutdown = asyncio.Event()
        worker = make_worker(
            queue or self.queue, self.storage, limits, terms, pause_grace_seconds=pause_grace_seconds, count_kills=count_kills
        )
        task = asyncio.create_task(worker.run(shutdown))
        try:
            yield
        finally:
            shutdown.set()
            await task

    def start_worker_process(self) -> "subprocess.Popen[bytes]":
        """Start a worker as a process of its own."""
        command = [sys.executable, "-m", "tests.jobs.worker_program", self.database_url, str(self.storage)]
        return subprocess.Popen(command, cwd=ROOT)

    async def read(self, job: Job) -> Job:
        """Read the job as the api does."""
        return await samples.read_job(self.database, job.job_id)

    @property
    def control(self) -> JobControl:
        """What callers do to jobs."""
        return JobControl(self.database, LocalFiles(self.storage))

    async def cancel(self, job: Job) -> None:
        """Ask for the job's end as the api does."""
        await samples.change_state(self.database, job.job_id, JobState.CANCELLING)

    async def pause(self, job: Job) -> Job:
        """Ask for a pause as a caller does."""
        return await self.control.pause(samples.ORGANIZATION, job.job_id)

    async def resume(self, job: Job) -> Job:
        """Let a paused job go on as a caller does."""
        return await self.control.resume(samples.ORGANIZATION, job.job_id)

    async def retry(self, job: Job) -> Job:
        """Try a job again as a caller does."""
        return await self.control.retry(samples.ORGANIZATION, job.job_id)

    def list_checkpoints(self, job: Job) -> list[str]:
        """Give the names of the checkpoints that lie in the job's directory."""
        return sorted(path.name for path in (self.storage / "default/jobs" / job.job_id).glob("checkpoint-*"))

    async def wait_for_state(self, job: Job, *states: JobState) -> Job:
        """Wait until the job is in one of the states."""
        await self.wait_until(lambda: self._is_in(job, states))
        return await self.read(job)

    async def wait_for_end(self, job: Job) -> Job:
        """Wait until the job is finished."""
        return await self.wait_for_state(job, *TERMINAL_STATES)

    async def wait_for_step(self, job: Job, step: int) -> None:
        """Wait until the step is logged."""

        async def is_there() -> bool:
            return (await self.read(job)).last_step >= step

        await self.wait_until(is_there)

    async def _is_in(self, job: Job, states: tuple[JobState, ...]) -> bool:
        return (await self.read(job)).state in states

    @staticmethod
    async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not await condition():
            assert time.monotonic() < deadline, "it did not happen"
            await asyncio.sleep(0.02)

    async def read_log(self, job: Job) -> list[JobEvent]:
        """Read the whole log; it has no gap, ever."""
        log = list(await samples.read_log(self.database, job.job_id))
        assert [event.sequence for event in log] == list(range(1, len(log) + 1))
        return log

    async def read_steps(self, job: Job) -> list[int]:
        """Give the logged steps, in order."""
        return [event.payload.step for event in await self.read_log(job) if isinstance(event.payload, StepDone)]

    async def read_states(self, job: Job) -> list[JobState]:
        """Give the states that the job went through."""
        return [event.payload.state for event in await self.read_log(job) if isinstance(event.payload, StateChanged)]

    def read_child_pids(self) -> list[int]:
        """Give the processes of the child that was started last."""
        return [int(pid) for pid in (self.storage / "pids").read_text().split()]

    async def assert_no_child(self) -> None:
        """See that nothing of the last child runs."""
        pids = self.read_child_pids()
        assert [pid for pid in pids if _is_alive(pid)] == []

    async def wait_for_no_child(self) -> None:
        """Wait until nothing of the last child runs."""

        async def is_gone() -> bool:
            return not any(_is_alive(pid) for pid in self.read_child_pids())

        await self.wait_until(is_gone)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
