"""Attempts, as the log of a job and of those that it tries again tells of them; resuming, and taking over checkpoints."""

import itertools
from dataclasses import replace

import psycopg
import pytest
from psycopg.rows import TupleRow

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.errors import FailedPrecondition
from server.domain.jobs import Attempt, Best, FailureReason, JobState
from server.services.job_queue import Lease
from tests.db.samples import (
    ORGANIZATION,
    add_job,
    add_retry,
    change_state,
    claim,
    fail_job,
    make_checkpoint,
    make_job,
    make_step,
    read_job,
    read_model,
    start_job,
)

S = JobState


async def _list(database: PostgresDatabase, job_id: str, before: int | None = None, limit: int = 10) -> list[Attempt]:
    async with database.transaction(ORGANIZATION) as transaction:
        return list(await transaction.jobs.list_attempts(job_id, before, limit))


async def _resume(database: PostgresDatabase, job_id: str) -> None:
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.jobs.resume(job_id)


async def _start_again(queue: PostgresJobQueue) -> Lease:
    lease = (await claim(queue)).lease
    await queue.change_state(lease, S.RUNNING, "")
    return lease


async def test_a_waiting_job_is_its_first_attempt(database: PostgresDatabase) -> None:
    job = await add_job(database)
    assert await _list(database, job.job_id) == [Attempt(job.job_id, 1, S.QUEUED)]


async def test_each_attempt_has_its_end_its_reason_and_its_last_step(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.append(lease, [make_step(1), make_step(2)])
    await queue.interrupt(lease, "the child was killed", 9)
    lease = await _start_again(queue)
    await queue.append(lease, [make_step(3)])
    await change_state(database, lease.job_id, S.PAUSING)
    await queue.interrupt(lease, "stopped", None)
    await _resume(database, lease.job_id)
    lease = await _start_again(queue)
    fourth = await _go_on_after_a_crash_without_a_step(queue, lease)
    await queue.append(fourth, [make_step(4)])
    found = await _list(database, lease.job_id)
    assert [(each.attempt, each.state, each.reason, each.last_step) for each in found] == [
        (4, S.RUNNING, "", 4),
        (3, S.INTERRUPTED, "the child was killed", None),
        (2, S.PAUSED, "asked for", 3),
        (1, S.INTERRUPTED, "the child was killed", 2),
    ]
    assert found[0].end_time is None
    assert {each.job_id for each in found} == {lease.job_id}
    for later, earlier in itertools.pairwise(found):
        assert earlier.start_time is not None
        assert earlier.end_time is not None
        assert later.start_time is not None
        assert earlier.start_time < earlier.end_time < later.start_time


async def _go_on_after_a_crash_without_a_step(queue: PostgresJobQueue, lease: Lease) -> Lease:
    await queue.interrupt(lease, "the child was killed", 9)
    return await _start_again(queue)


async def test_a_retry_lists_the_attempts_at_what_it_tries_again_too(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    failed, retry = await add_retry(database, queue)
    found = await _list(database, retry.job_id)
    assert [(each.job_id, each.attempt, each.state) for each in found] == [(retry.job_id, 2, S.QUEUED), (failed.job_id, 1, S.FAILED)]
    assert found[1].error is not None
    assert (found[1].reason, found[1].error.message) == ("DISK_FULL", "The disk is full.")
    assert found[1].last_step == 5
    assert [each.attempt for each in await _list(database, failed.job_id)] == [1]
    assert [each.attempt for each in await _list(database, retry.job_id, before=2)] == [1]
    assert [each.attempt for each in await _list(database, retry.job_id, limit=1)] == [2]


async def test_a_retry_takes_over_the_checkpoints_and_goes_on_from_them(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    failed = await fail_job(database, queue, 5, 10)
    best = Best(10, -1.0)
    assert (await read_job(database, failed.job_id)).best == best
    retry = replace(make_job(await read_model(database, failed.model_id)), attempt=2, retry_of_job_id=failed.job_id, best=best)
    await add_job(database, job=retry)
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.jobs.list_checkpoints(failed.job_id) == []
        assert [each.step for each in await transaction.jobs.list_checkpoints(retry.job_id)] == [10, 5]
        assert await transaction.jobs.find_retry(failed.job_id) == retry.job_id
        assert await transaction.jobs.find_retry(retry.job_id) is None
    assert make_checkpoint(10).path in await queue.list_live_directories()
    claimed = await claim(queue)
    assert claimed.checkpoint is not None
    assert (claimed.job.job_id, claimed.checkpoint.path, claimed.job.best) == (retry.job_id, make_checkpoint(10).path, best)


async def test_no_job_is_retried_twice(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    failed, retry = await add_retry(database, queue)
    with pytest.raises(Exception, match="jobs_by_retried"):
        await add_job(database, job=replace(make_job(await read_model(database, failed.model_id)), retry_of_job_id=failed.job_id))
    assert (await read_job(database, retry.job_id)).state is S.QUEUED


@pytest.mark.parametrize("state", sorted(set(S) - {S.PAUSED}))
async def test_only_a_paused_job_is_resumed(database: PostgresDatabase, sql: psycopg.Connection[TupleRow], state: JobState) -> None:
    job = await add_job(database)
    sql.execute("UPDATE jobs SET state = %s, lease_start_time = now()", (state,))
    with pytest.raises(FailedPrecondition, match=f"is {state}"):
        await _resume(database, job.job_id)
    assert (await read_job(database, job.job_id)).attempt == 1


async def test_a_failure_reason_is_not_lost_with_the_crash_before_it(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.interrupt(lease, "killed", 1, FailureReason.OUT_OF_MEMORY)
    (attempt,) = await _list(database, lease.job_id)
    assert attempt.error is not None
    assert (attempt.state, attempt.reason, attempt.error.reason) == (S.FAILED, "OUT_OF_MEMORY", "OUT_OF_MEMORY")
