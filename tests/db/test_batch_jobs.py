"""Batch generations in the database: without a model of their own, in a queue of their own, with parts and a result."""

import psycopg
import pytest
from psycopg.rows import TupleRow

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.errors import FailedPrecondition, NotFound
from server.domain.events import BatchAdvanced
from server.domain.jobs import BatchCounters, Job, JobKind, JobResult, JobState
from server.services.job_queue import ClaimLimits
from server.services.ports import JobFilter, Page
from tests.db.samples import (
    BASE_MODEL,
    LEASE_SECONDS,
    ORGANIZATION,
    RESULT,
    add_dataset,
    add_job,
    claim,
    finish_job,
    make_batch,
    make_checkpoint,
    read_job,
    read_model,
    start_job,
)

ALL = 1_000


async def _add_batch(database: PostgresDatabase) -> Job:
    return await add_job(database, job=make_batch(await add_dataset(database)))


async def test_a_job_may_use_a_base_model(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    job = await _add_batch(database)
    other = await add_job(database)
    claimed = await claim(queue)
    assert (claimed.job.job_id, claimed.job.model_id, claimed.version) == (job.job_id, BASE_MODEL, None)
    assert claimed.dataset is not None
    assert (claimed.dataset.record_count, claimed.dataset.invalid_record_count) == (10, 1)
    async with database.transaction(ORGANIZATION) as transaction:
        found = await transaction.jobs.list(JobFilter(model_id=BASE_MODEL), Page(10))
        assert [each.job_id for each in found] == [job.job_id]  # and not the fine-tuning of the same base model
        assert await transaction.jobs.list(JobFilter(model_id="no/such"), Page(10)) == []
        assert await transaction.jobs.list_active(dataset_id=job.spec.dataset_id) == [job.job_id]  # type: ignore[union-attr]
    assert all(path is not None for path in await queue.list_live_directories())
    assert (await read_job(database, other.job_id)).queue_position == 1


async def test_batches_have_a_limit_and_a_queue_of_their_own(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    batches = [await _add_batch(database) for _ in range(2)]
    await add_job(database)
    assert (await read_job(database, batches[1].job_id)).queue_position == 2
    limits = ClaimLimits(training_jobs=1, index_jobs=1, batch_jobs=1)
    claims = [await queue.claim("w", limits, LEASE_SECONDS) for _ in range(3)]
    assert [found and found.job.kind for found in claims] == [JobKind.BATCH_GENERATION, JobKind.FINE_TUNE, None]


async def test_an_attempt_gets_all_parts_in_their_order(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue, job=make_batch(await add_dataset(database)))
    for records in (5, 10, 250):
        assert not await queue.record_checkpoint(lease, make_checkpoint(records), ALL)
    await queue.append(lease, [BatchAdvanced(BatchCounters(240, 10, 700, 300), 500, 50.0, 9.0)])
    await queue.interrupt(lease, "killed", 5)
    claimed = await claim(queue)
    assert [part.step for part in claimed.checkpoints] == [5, 10, 250]
    progress, usage = claimed.job.progress, claimed.job.usage
    assert (progress.step, progress.total_steps, progress.tokens, progress.eta_seconds) == (250, 500, 1_000, 9.0)
    assert (progress.batch, usage.tokens) == (BatchCounters(240, 10, 700, 300), 1_000)


async def test_a_result_is_kept_for_a_time_and_its_model_stays_as_it_was(
    database: PostgresDatabase, queue: PostgresJobQueue, sql: psycopg.Connection[TupleRow]
) -> None:
    model_lease = await start_job(database, queue)
    await finish_job(queue, model_lease)
    model = await read_model(database, (await read_job(database, model_lease.job_id)).model_id)
    lease = await start_job(database, queue, job=make_batch(await add_dataset(database), model))
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.models.list_version_users(model.model_id, 1) == [lease.job_id]
        with pytest.raises(NotFound, match="result"):
            await transaction.jobs.get_result(lease.job_id)
    await finish_job(queue, lease)
    assert (await read_job(database, lease.job_id)).state is JobState.SUCCEEDED
    assert await read_model(database, model.model_id) == model
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.jobs.get_result(lease.job_id) == JobResult(RESULT.artifact_path, RESULT.manifest_sha256)
        assert await transaction.jobs.list_result_paths(model.model_id) == [RESULT.artifact_path]
    async with database.transaction("another") as transaction:
        with pytest.raises(NotFound):
            await transaction.jobs.get_result(lease.job_id)
        assert await transaction.jobs.list_result_paths(model.model_id) == []
    await queue.drop_old_results(60)
    assert RESULT.artifact_path in await queue.list_live_directories()
    sql.execute("UPDATE job_results SET create_time = now() - interval '61 seconds'")
    sql.execute("DELETE FROM model_versions")  # which names the same files here
    await queue.drop_old_results(60)
    assert RESULT.artifact_path not in await queue.list_live_directories()


async def test_a_model_in_use_stays_and_takes_results_with_it(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model_lease = await start_job(database, queue)
    await finish_job(queue, model_lease)
    model = await read_model(database, (await read_job(database, model_lease.job_id)).model_id)
    lease = await start_job(database, queue, job=make_batch(await add_dataset(database), model))
    async with database.transaction(ORGANIZATION) as transaction:
        with pytest.raises(FailedPrecondition, match="not finished"):
            await transaction.models.delete(model.model_id)
    await finish_job(queue, lease)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.models.delete(model.model_id)
        with pytest.raises(NotFound):
            await transaction.jobs.get_result(lease.job_id)
