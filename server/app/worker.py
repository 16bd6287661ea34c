"""The worker's role: jobs from the queue to children of its own."""

import asyncio
import sys

from server.app.parts import open_objects
from server.childprocess import announce_ready
from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.db.vector_placement import PostgresVectorTables
from server.jobs.files import JobFiles
from server.jobs.localchild import LocalExecution
from server.jobs.runner import JobRunner, LeaseTerms
from server.jobs.worker import Worker
from server.services.job_queue import ClaimLimits
from server.settings import Settings


async def run_worker(settings: Settings, stop: asyncio.Event, ready_fd: int | None) -> None:
    """Work until `stop` is set."""
    assert settings.database_url is not None
    database = PostgresDatabase(settings.database_url, application_name="model-training-worker")
    queue = PostgresJobQueue(database)
    files = JobFiles(settings.storage_path, open_objects(settings))
    terms = LeaseTerms(settings.lease_seconds, settings.heartbeat_seconds, settings.max_job_attempts)
    runner = JobRunner(queue, LocalExecution([sys.executable, "-m", "server"]), files, terms)
    limits = ClaimLimits(settings.max_training_jobs, settings.max_index_jobs, settings.max_batch_jobs)
    worker = Worker(queue, runner, files, limits, terms, PostgresVectorTables(database))
    announce_ready(ready_fd)
    try:
        await worker.run(stop)
    finally:
        await database.close()
