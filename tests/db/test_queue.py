"""Claiming, leases and limits, over several workers at once."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import psycopg
import pytest
from psycopg.rows import TupleRow

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.documents import DocumentState
from server.domain.errors import FailedPrecondition
from server.domain.events import IndexProgress
from server.domain.jobs import HELD_STATES, IndexCounters, JobKind, JobState, may_follow
from server.services.job_queue import ClaimLimits
from server.services.ports import Page
from tests.db.samples import (
    LEASE_SECONDS,
    LIMITS,
    ORGANIZATION,
    add_dataset,
    add_documents,
    add_job,
    add_model,
    change_state,
    claim,
    finish_job,
    make_checkpoint,
    make_chunks,
    make_rag_model,
    make_vectors,
    read_job,
    read_log,
    start_job,
)

WORKERS = 4


@pytest.fixture
async def queues(database_url: str) -> AsyncIterator[list[PostgresJobQueue]]:
    """The queues of several workers, each with connections of its own."""
    databases = [PostgresDatabase(database_url, pool_size=3) for _ in range(WORKERS)]
    yield [PostgresJobQueue(database) for database in databases]
    for database in databases:
        await database.close()


async def test_an_empty_queue_gives_nothing(queue: PostgresJobQueue) -> None:
    assert await queue.claim("worker", LIMITS, LEASE_SECONDS) is None


async def test_a_claimed_job_is_starting_under_a_new_epoch(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    dataset, evaluation = await add_dataset(database), await add_dataset(database)
    job = await add_job(database, dataset=dataset)
    claimed = await claim(queue)
    assert (claimed.lease.organization, claimed.lease.job_id, claimed.lease.epoch) == (ORGANIZATION, job.job_id, 1)
    assert (claimed.job.state, claimed.job.lease_epoch, claimed.checkpoint) == (JobState.STARTING, 1, None)
    assert claimed.dataset is not None
    assert (claimed.dataset.path, claimed.eval_dataset) == (dataset.path, None)
    assert claimed.job.spec == job.spec
    assert (await read_job(database, job.job_id)).state is JobState.STARTING
    assert evaluation.path != dataset.path


async def test_the_oldest_job_is_claimed_first_over_all_organizations(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    jobs = [await add_job(database, organization=organization) for organization in ("default", "other", "default")]
    claimed = [(await claim(queue)).lease.job_id for _ in jobs]
    assert claimed == sorted(job.job_id for job in jobs)


async def test_claimers_at_once_never_get_the_same_job(database: PostgresDatabase, queues: list[PostgresJobQueue]) -> None:
    jobs = {(await add_job(database)).job_id for _ in range(12)}
    claims = await asyncio.gather(*(queues[number % WORKERS].claim("w", LIMITS, LEASE_SECONDS) for number in range(24)))
    taken = [found.lease.job_id for found in claims if found]
    assert sorted(taken) == sorted(jobs)


@pytest.mark.parametrize("most", [0, 1, 3])
async def test_the_limit_holds_over_all_workers(database: PostgresDatabase, queues: list[PostgresJobQueue], most: int) -> None:
    for kind in (JobKind.FINE_TUNE, JobKind.EXPORT, JobKind.FINE_TUNE, JobKind.EXPORT, JobKind.FINE_TUNE):
        await add_job(database, kind=kind)
    limits = ClaimLimits(training_jobs=most, index_jobs=5, batch_jobs=5)
    claims = await asyncio.gather(*(queues[number % WORKERS].claim("w", limits, LEASE_SECONDS) for number in range(12)))
    held = [found for found in claims if found]
    assert len(held) == most
    if held:
        lease = next(found.lease for found in held if found.job.kind is JobKind.FINE_TUNE)
        await queues[0].change_state(lease, JobState.RUNNING, "")
        await finish_job(queues[0], lease)
        assert await queues[1].claim("w", limits, LEASE_SECONDS) is not None
        assert await queues[1].claim("w", limits, LEASE_SECONDS) is None


async def test_index_jobs_and_trainings_have_limits_of_their_own(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    for _ in range(2):
        await add_job(database)
        await add_job(database, await add_model(database, make_rag_model()))
    limits = ClaimLimits(training_jobs=1, index_jobs=1, batch_jobs=1)
    claims = [await queue.claim("w", limits, LEASE_SECONDS) for _ in range(3)]
    assert [found and found.job.kind for found in claims].count(None) == 1
    assert {found.job.kind for found in claims if found} == {JobKind.FINE_TUNE, JobKind.RAG_INDEX}


async def test_a_job_that_the_api_is_changing_is_passed_over(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    first, second = sorted([(await add_job(database)).job_id, (await add_job(database)).job_id])
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.jobs.change_state(first, JobState.CANCELLED, "")
        assert (await claim(queue)).lease.job_id == second
    assert await queue.claim("w", LIMITS, LEASE_SECONDS) is None


async def test_a_heartbeat_renews_the_lease_and_brings_back_the_state(
    database: PostgresDatabase, queue: PostgresJobQueue, sql: psycopg.Connection[TupleRow]
) -> None:
    lease = await start_job(database, queue)
    assert await queue.heartbeat(lease, 500) is JobState.RUNNING
    row = sql.execute("SELECT extract(epoch FROM lease_end_time - now())::float FROM jobs").fetchone()
    assert row is not None
    assert 490 < row[0] <= 500
    await change_state(database, lease.job_id, JobState.CANCELLING)
    assert await queue.heartbeat(lease, 500) is JobState.CANCELLING


async def test_a_job_goes_on_from_its_latest_checkpoint_row(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    for step in (5, 10):
        await queue.record_checkpoint(lease, make_checkpoint(step), keep=3)
    await queue.interrupt(lease, "the child was killed", max_attempts=3)
    again = await claim(queue)
    assert (again.lease.job_id, again.lease.epoch, again.job.attempt) == (lease.job_id, 2, 2)
    assert again.checkpoint is not None
    assert (again.checkpoint.step, again.checkpoint.path) == (10, make_checkpoint(10).path)


async def test_only_the_latest_checkpoints_are_kept(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    dropped = [await queue.record_checkpoint(lease, make_checkpoint(step), keep=2) for step in (5, 10, 15, 20)]
    assert [[checkpoint.step for checkpoint in each] for each in dropped] == [[], [], [5], [10]]
    moved = replace(make_checkpoint(20), path="elsewhere")
    assert [checkpoint.path for checkpoint in await queue.record_checkpoint(lease, moved, keep=2)] == [make_checkpoint(20).path]
    assert [checkpoint.step for checkpoint in await queue.record_checkpoint(lease, make_checkpoint(25), keep=0)] == [15, 20]


async def test_the_transition_table_holds_for_the_worker(
    database: PostgresDatabase, queue: PostgresJobQueue, sql: psycopg.Connection[TupleRow]
) -> None:
    lease = await start_job(database, queue)
    for before in sorted(HELD_STATES):
        for after in JobState:
            sql.execute("UPDATE jobs SET state = %s, lease_start_time = now()", (before,))
            stopping = before in (JobState.CANCELLING, JobState.PAUSING)
            if may_follow(before, after) or stopping:
                await queue.change_state(lease, after, "")
            else:
                with pytest.raises(FailedPrecondition):
                    await queue.change_state(lease, after, "")
            assert (await read_job(database, lease.job_id)).state is (after if may_follow(before, after) else before)


async def test_pending_documents_are_streamed_oldest_first(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await add_model(database, make_rag_model())
    ids = await add_documents(database, model, [f"text {number}" for number in range(40)])
    await add_documents(database, await add_model(database, make_rag_model()), ["another model's"])
    lease = await start_job(database, queue, model)
    read = [document async for document in queue.read_pending_documents(lease)]
    assert [document.document_id for document in read] == sorted(ids)
    assert {document.text for document in read} == {f"text {number}" for number in range(40)}
    assert all(document.title == f"Title of {document.text}" for document in read)
    await queue.commit_document(lease, sorted(ids)[0], [], b"", 0, "", 40)
    assert [document.document_id async for document in queue.read_pending_documents(lease)] == sorted(ids)[1:]


async def test_committed_documents_are_the_progress_of_an_index_job(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await add_model(database, make_rag_model())
    good, bad, deleted = await add_documents(database, model, ["good", "bad", "deleted"])
    lease = await start_job(database, queue, model)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.documents.delete(model.model_id, deleted)
    vectors = make_vectors(2).tobytes()
    await queue.commit_document(lease, good, make_chunks(["a", "b"]), vectors, 8, "", 3)
    await queue.commit_document(lease, good, make_chunks(["a", "b"]), vectors, 8, "", 3)
    await queue.commit_document(lease, bad, [], b"", 0, "It is empty.", 3)
    await queue.commit_document(lease, deleted, make_chunks(["c"]), make_vectors(1).tobytes(), 8, "", 3)
    progress = [event.payload for event in await read_log(database, lease.job_id)][4:]
    assert progress == [
        IndexProgress(good, 1, 3, 2, counters=IndexCounters(0, 0, 0, 0, 1, 2)),
        IndexProgress(bad, 2, 3, 0, "It is empty.", counters=IndexCounters(0, 0, 0, 0, 2, 2)),
        IndexProgress(deleted, 3, 3, 0, "The document was deleted while it was being indexed.", counters=IndexCounters(0, 0, 0, 0, 3, 2)),
    ]
    job = await read_job(database, lease.job_id)
    assert (job.progress.step, job.progress.total_steps, job.progress.fraction) == (3, 3, 1.0)
    async with database.transaction(ORGANIZATION) as transaction:
        states = {each.document_id: each.state for each in await transaction.documents.list(model.model_id, Page(9))}
    assert states == {good: DocumentState.INDEXED, bad: DocumentState.FAILED}


async def test_live_directories_are_all_that_rows_name_or_held_jobs_write(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    dataset = await add_dataset(database)
    done = await start_job(database, queue)
    await queue.record_checkpoint(done, make_checkpoint(5), keep=1)
    await finish_job(queue, done)
    paused = await start_job(database, queue)
    await queue.record_checkpoint(paused, make_checkpoint(7), keep=1)
    await change_state(database, paused.job_id, JobState.PAUSING)
    await queue.interrupt(paused, "stopped", None)
    held = await start_job(database, queue)
    waiting = await add_job(database)
    model_id = (await read_job(database, held.job_id)).model_id
    live = set(await queue.list_live_directories())
    assert live == {
        dataset.path,
        make_checkpoint(7).path,
        "default/models/m/j-1",
        f"default/jobs/{held.job_id}",
        f"default/models/{model_id}/{held.job_id}-1",
    }
    assert not any(waiting.job_id in path for path in live)
