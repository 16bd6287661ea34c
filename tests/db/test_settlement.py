"""How jobs end: what becomes of the row, the model and its versions, in one transaction."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import psycopg
import pytest
from psycopg.rows import TupleRow
from sqlalchemy.exc import IntegrityError

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.errors import ErrorData, FailedPrecondition
from server.domain.events import StateChanged
from server.domain.jobs import FailureReason, JobState
from server.domain.models import ModelState
from server.services.job_queue import Lease
from tests.db.samples import (
    BASE_MODEL,
    ORGANIZATION,
    RESULT,
    add_documents,
    add_job,
    add_model,
    change_state,
    claim,
    fail_job,
    finish_job,
    make_checkpoint,
    make_chunks,
    make_export,
    make_rag_model,
    make_step,
    make_vectors,
    read_job,
    read_log,
    read_model,
    start_job,
)

ERROR = ErrorData("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "The batch does not fit.", {"suggestion": "halve batch_size"}, [])


async def _states(database: PostgresDatabase, job_id: str) -> Sequence[tuple[JobState, int]]:
    log = await read_log(database, job_id)
    return [(event.payload.state, event.attempt) for event in log if isinstance(event.payload, StateChanged)]


async def _model_state(database: PostgresDatabase, lease: Lease) -> ModelState:
    return (await read_model(database, (await read_job(database, lease.job_id)).model_id)).state


async def test_success_makes_a_version_and_the_model_ready(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.append(lease, [make_step(1)])
    await finish_job(queue, lease)
    job = await read_job(database, lease.job_id)
    model = await read_model(database, job.model_id)
    assert (job.state, job.usage.artifact_bytes, job.usage.peak_memory_bytes) == (JobState.SUCCEEDED, 1_000, 5_000)
    assert (model.state, model.serving_version, model.version_count) == (ModelState.READY, 1, 1)
    async with database.transaction(ORGANIZATION) as transaction:
        (version,) = await transaction.models.list_versions(job.model_id, 10)
        assert await transaction.models.get_version(job.model_id, 1) == version
    assert (version.version, version.job_id, version.base_model) == (1, job.job_id, BASE_MODEL)
    assert (version.artifact_path, version.manifest_sha256, version.size_bytes) == (RESULT.artifact_path, RESULT.manifest_sha256, 1_000)
    assert (version.base_revision, version.metrics) == ("main", {"eval_loss": 1.5})


async def test_versions_of_jobs_that_end_at_once_are_numbered_in_turn(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await add_model(database)
    leases = [await start_job(database, queue, model) for _ in range(5)]
    await asyncio.gather(*(finish_job(queue, lease) for lease in leases))
    async with database.transaction(ORGANIZATION) as transaction:
        versions = await transaction.models.list_versions(model.model_id, 10)
    assert [version.version for version in versions] == [5, 4, 3, 2, 1]
    assert {version.job_id for version in versions} == {lease.job_id for lease in leases}
    assert (await read_model(database, model.model_id)).serving_version == 5


async def test_a_finished_index_makes_the_model_ready_without_a_version(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await add_model(database, make_rag_model())
    (document_id,) = await add_documents(database, model, ["text"])
    lease = await start_job(database, queue, model)
    await queue.commit_document(lease, document_id, make_chunks(["a", "b"]), make_vectors(2).tobytes(), 8, "", 1)
    await finish_job(queue, lease)
    ready = await read_model(database, model.model_id)
    assert (ready.state, ready.version_count, ready.chunk_count, ready.serving_version) == (ModelState.READY, 0, 2, None)


async def test_success_needs_a_job_that_is_finalizing(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    with pytest.raises(FailedPrecondition):
        await queue.complete(lease, RESULT)
    assert await _model_state(database, lease) is ModelState.CREATING


async def test_success_is_whole_or_not_at_all(
    database: PostgresDatabase, queue: PostgresJobQueue, sql: psycopg.Connection[TupleRow]
) -> None:
    lease = await start_job(database, queue)
    await queue.change_state(lease, JobState.FINALIZING, "")
    sql.execute("INSERT INTO model_versions SELECT organization, model_id, 7, job_id, '', '', '', '', 0, '{}', now() FROM jobs")
    with pytest.raises(IntegrityError, match="model_versions_of_job"):
        await queue.complete(lease, RESULT)
    assert (await read_job(database, lease.job_id)).state is JobState.FINALIZING
    assert await _model_state(database, lease) is ModelState.CREATING


async def test_a_job_that_was_cancelled_meanwhile_does_not_succeed(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.change_state(lease, JobState.FINALIZING, "")
    await change_state(database, lease.job_id, JobState.CANCELLING)
    assert await queue.complete(lease, RESULT) is JobState.CANCELLING
    await queue.change_state(lease, JobState.RUNNING, "")
    assert (await read_job(database, lease.job_id)).state is JobState.CANCELLING
    assert await queue.interrupt(lease, "stopped", None) is JobState.CANCELLED
    job = await read_job(database, lease.job_id)
    model = await read_model(database, job.model_id)
    assert (job.state, model.state, model.version_count) == (JobState.CANCELLED, ModelState.FAILED, 0)
    assert model.error is not None
    assert model.error.reason == "JOB_CANCELLED"


async def test_failure_is_told_by_job_event_and_model(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.fail(lease, FailureReason.OUT_OF_MEMORY, ERROR)
    job = await read_job(database, lease.job_id)
    model = await read_model(database, job.model_id)
    assert (job.state, job.state_reason, job.error) == (JobState.FAILED, "OUT_OF_MEMORY", ERROR)
    assert (model.state, model.error) == (ModelState.FAILED, ERROR)
    assert (await read_log(database, job.job_id))[-1].payload == StateChanged(JobState.FAILED, "OUT_OF_MEMORY", ERROR, JobState.RUNNING)


async def test_a_failed_job_leaves_a_model_that_serves_ready(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await add_model(database)
    await finish_job(queue, await start_job(database, queue, model))
    await queue.fail(await start_job(database, queue, model), FailureReason.OUT_OF_MEMORY, ERROR)
    assert (await read_model(database, model.model_id)).state is ModelState.READY


async def test_a_later_success_mends_a_failed_model(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await add_model(database)
    await queue.fail(await start_job(database, queue, model), FailureReason.OUT_OF_MEMORY, ERROR)
    await finish_job(queue, await start_job(database, queue, model))
    mended = await read_model(database, model.model_id)
    assert (mended.state, mended.error, mended.version_count) == (ModelState.READY, None, 1)


async def test_a_job_that_fails_while_it_is_cancelled_is_cancelled(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await change_state(database, lease.job_id, JobState.CANCELLING)
    await queue.fail(lease, FailureReason.OUT_OF_MEMORY, ERROR)
    assert (await read_job(database, lease.job_id)).state is JobState.CANCELLED


async def test_an_interrupted_job_waits_for_its_next_attempt(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    assert await queue.interrupt(lease, "the child was killed", 3) is JobState.QUEUED
    job = await read_job(database, lease.job_id)
    assert (job.state, job.attempt, job.queue_position) == (JobState.QUEUED, 2, 1)
    assert job.usage.compute_seconds > 0
    assert (await _states(database, lease.job_id))[-2:] == [(JobState.INTERRUPTED, 1), (JobState.QUEUED, 2)]


async def test_an_export_changes_no_model_however_it_ends(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await add_model(database)
    ends: list[Callable[[Lease], Awaitable[object]]] = [
        lambda lease: queue.fail(lease, FailureReason.OUT_OF_MEMORY, ERROR),
        lambda lease: _cancel(database, queue, lease),
        lambda lease: queue.interrupt(lease, "killed", 1),
    ]
    for end in ends:
        await add_job(database, job=make_export(model))
        await end((await claim(queue)).lease)
        assert (await read_model(database, model.model_id)).state is ModelState.CREATING


async def _cancel(database: PostgresDatabase, queue: PostgresJobQueue, lease: Lease) -> None:
    await change_state(database, lease.job_id, JobState.CANCELLING)
    await queue.interrupt(lease, "stopped", None)


async def test_an_export_that_another_has_overtaken_takes_its_place(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    model = await read_model(database, (await read_job(database, lease.job_id)).model_id)
    await finish_job(queue, lease)
    for name in ("first", "second"):
        await add_job(database, job=make_export(model))
        export = (await claim(queue)).lease
        await queue.change_state(export, JobState.RUNNING, "")
        await queue.change_state(export, JobState.FINALIZING, "")
        assert await queue.complete(export, replace(RESULT, artifact_path=name))
    live = await queue.list_live_directories()
    assert "second" in live
    assert "first" not in live


async def test_crashes_of_one_kind_may_have_a_name_of_their_own(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    assert await queue.interrupt(lease, "killed for memory", 2, FailureReason.OUT_OF_MEMORY) is JobState.QUEUED
    lease = (await claim(queue)).lease
    assert await queue.interrupt(lease, "killed for memory", 2, FailureReason.OUT_OF_MEMORY) is JobState.FAILED
    job = await read_job(database, lease.job_id)
    assert job.error is not None
    assert (job.state_reason, job.error.reason) == ("OUT_OF_MEMORY", "OUT_OF_MEMORY")
    assert "batch_size" in job.error.metadata["suggestion"]


@pytest.mark.parametrize("end", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
async def test_only_a_failed_job_keeps_its_checkpoints(database: PostgresDatabase, queue: PostgresJobQueue, end: JobState) -> None:
    lease = await start_job(database, queue)
    await queue.record_checkpoint(lease, make_checkpoint(5), keep=2)
    if end is JobState.SUCCEEDED:
        await finish_job(queue, lease)
    elif end is JobState.CANCELLED:
        await _cancel(database, queue, lease)
    else:
        await queue.fail(lease, FailureReason.DISK_FULL, ERROR)
    async with database.transaction(ORGANIZATION) as transaction:
        assert (await transaction.jobs.get(lease.job_id)).state is end
        assert bool(await transaction.jobs.list_checkpoints(lease.job_id)) is (end is JobState.FAILED)


async def test_a_failed_job_loses_its_checkpoints_in_the_end(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    failed = await fail_job(database, queue, 5)
    waiting = await start_job(database, queue)
    await queue.record_checkpoint(waiting, make_checkpoint(7), keep=2)

    async def count(job_id: str) -> int:
        async with database.transaction(ORGANIZATION) as transaction:
            return len(await transaction.jobs.list_checkpoints(job_id))

    await queue.drop_old_checkpoints(3600)
    assert (await count(failed.job_id), await count(waiting.job_id)) == (1, 1)
    await queue.drop_old_checkpoints(0)
    assert (await count(failed.job_id), await count(waiting.job_id)) == (0, 1)


async def test_a_job_that_is_interrupted_too_often_fails(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    for expected in (JobState.QUEUED, JobState.QUEUED, JobState.FAILED):
        assert await queue.interrupt(lease, "the child was killed", 3) is expected
        if expected is JobState.QUEUED:
            lease = (await claim(queue)).lease
    job = await read_job(database, lease.job_id)
    assert (job.state, job.state_reason, job.attempt) == (JobState.FAILED, "CRASH_LOOP", 3)
    assert job.error is not None
    assert "3 times" in job.error.message
    assert await _model_state(database, lease) is ModelState.FAILED
    assert [event.sequence for event in await read_log(database, lease.job_id)] == list(range(1, job.last_sequence + 1))


async def test_crashes_count_from_the_last_checkpoint_and_planned_stops_never(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    for saved_step, most in ((None, 2), (5, 2), (None, None), (None, None), (9, 2)):
        if saved_step is not None:
            await queue.record_checkpoint(lease, make_checkpoint(saved_step), keep=2)
        assert await queue.interrupt(lease, "gone", most) is JobState.QUEUED
        lease = (await claim(queue)).lease
        await queue.change_state(lease, JobState.RUNNING, "")
    assert await queue.interrupt(lease, "gone", 2) is JobState.FAILED
    assert (await read_job(database, lease.job_id)).attempt == 6


@pytest.mark.parametrize(
    ("asked", "reached"),
    [(None, JobState.QUEUED), (JobState.CANCELLING, JobState.CANCELLED), (JobState.PAUSING, JobState.PAUSED)],
)
async def test_the_job_of_a_dead_worker_is_reaped(
    database: PostgresDatabase, queue: PostgresJobQueue, asked: JobState | None, reached: JobState
) -> None:
    lease = await start_job(database, queue)
    if asked:
        await change_state(database, lease.job_id, asked)
    assert await queue.reap(3) == []
    await queue.heartbeat(lease, -1)
    assert await queue.reap(3) == [lease.job_id]
    assert (await read_job(database, lease.job_id)).state is reached


async def test_reapers_at_once_reap_a_job_once(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    leases = [await start_job(database, queue) for _ in range(4)]
    for lease in leases:
        await queue.heartbeat(lease, -1)
    reaped = await asyncio.gather(*(queue.reap(3) for _ in range(6)))
    assert sorted(job_id for each in reaped for job_id in each) == sorted(lease.job_id for lease in leases)
    for lease in leases:
        assert (await read_job(database, lease.job_id)).attempt == 2


async def test_a_waiting_job_is_not_reaped(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    job = await add_job(database)
    assert await queue.reap(1) == []
    assert (await read_job(database, job.job_id)).state is JobState.QUEUED
