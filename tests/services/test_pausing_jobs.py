"""Pause, resume and retry, in every state that a job can be in; attempts, events and checkpoints page by page."""

import psycopg
import pytest

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.errors import ErrorData, FailedPrecondition, InvalidInput, NotFound
from server.domain.ids import JOB, new_id
from server.domain.jobs import Best, FailureReason, Job, JobKind, JobState
from server.domain.models import ModelState
from server.services.requests import PageRequest
from tests.db.samples import (
    add_dataset,
    add_documents,
    add_job,
    add_model,
    change_state,
    claim,
    fail_job,
    finish_job,
    make_batch,
    make_checkpoint,
    make_evaluation,
    make_export,
    make_rag_model,
    read_job,
    read_model,
    start_job,
)
from tests.services.conftest import ORGANIZATION, UseCases
from tests.services.test_cancelling import put_job

S = JobState
AFTER_PAUSE = {S.QUEUED: S.PAUSED, S.STARTING: S.PAUSING, S.RUNNING: S.PAUSING, S.PAUSING: S.PAUSING, S.PAUSED: S.PAUSED}


@pytest.fixture
def queue(database: PostgresDatabase) -> PostgresJobQueue:
    """What a worker does to jobs."""
    return PostgresJobQueue(database)


@pytest.mark.parametrize("state", sorted(S))
async def test_a_job_is_paused_where_it_can_be_and_twice_is_harmless(
    use_cases: UseCases, database: PostgresDatabase, database_url: str, state: JobState
) -> None:
    job_id = await put_job(database, database_url, state)
    if state in AFTER_PAUSE:
        reached = [(await use_cases.training.control.pause(ORGANIZATION, job_id)).state for _ in range(2)]
        assert reached == [AFTER_PAUSE[state]] * 2
    else:
        with pytest.raises(FailedPrecondition, match=state.value):
            await use_cases.training.control.pause(ORGANIZATION, job_id)
        assert (await read_job(database, job_id)).state is state


async def test_a_batch_generation_can_be_paused_resumed_and_tried_again(use_cases: UseCases, database: PostgresDatabase) -> None:
    control, dataset = use_cases.training.control, await add_dataset(database)
    job = await add_job(database, job=make_batch(dataset))
    assert (await control.pause(ORGANIZATION, job.job_id)).state is S.PAUSED
    assert (await control.resume(ORGANIZATION, job.job_id)).state is S.QUEUED
    assert (await control.cancel(ORGANIZATION, job.job_id)).state is S.CANCELLED
    again = await control.retry(ORGANIZATION, job.job_id)
    assert (again.model_id, again.spec, again.retry_of_job_id) == (job.model_id, job.spec, job.job_id)
    await control.cancel(ORGANIZATION, again.job_id)
    await use_cases.datasets.delete(ORGANIZATION, dataset.dataset_id)
    with pytest.raises(FailedPrecondition, match="was deleted") as refusal:
        await control.retry(ORGANIZATION, again.job_id)
    assert refusal.value.reason == "JOB_INPUT_GONE"


async def test_no_index_and_no_export_can_be_paused(use_cases: UseCases, database: PostgresDatabase) -> None:
    index = await add_job(database, await add_model(database, make_rag_model()))
    export = await add_job(database, job=make_export(await add_model(database)))
    for job in (index, export):
        with pytest.raises(FailedPrecondition, match="only FINE_TUNE and BATCH_GENERATION"):
            await use_cases.training.control.pause(ORGANIZATION, job.job_id)


async def test_a_resumed_job_waits_in_its_old_place_as_the_next_attempt(use_cases: UseCases, database: PostgresDatabase) -> None:
    first, second = await add_job(database), await add_job(database)
    control = use_cases.training.control
    await control.pause(ORGANIZATION, first.job_id)
    resumed = await control.resume(ORGANIZATION, first.job_id)
    assert (resumed.state, resumed.attempt, resumed.queue_position) == (S.QUEUED, 2, 1)
    assert (await read_job(database, second.job_id)).queue_position == 2
    with pytest.raises(FailedPrecondition):
        await control.resume(ORGANIZATION, first.job_id)


@pytest.mark.parametrize("state", sorted(set(S) - {S.FAILED, S.CANCELLED}))
async def test_a_job_that_has_not_failed_is_not_retried(
    use_cases: UseCases, database: PostgresDatabase, database_url: str, state: JobState
) -> None:
    job_id = await put_job(database, database_url, state)
    with pytest.raises(FailedPrecondition, match=state.value):
        await use_cases.training.control.retry(ORGANIZATION, job_id)


async def test_a_retry_is_a_new_job_that_goes_on_and_its_model_comes_to_be_again(
    use_cases: UseCases, database: PostgresDatabase, queue: PostgresJobQueue
) -> None:
    failed = await fail_job(database, queue, 5, 10)
    assert (await read_model(database, failed.model_id)).state is ModelState.FAILED
    retry = await use_cases.training.control.retry(ORGANIZATION, failed.job_id)
    assert (retry.state, retry.attempt, retry.retry_of_job_id, retry.spec) == (S.QUEUED, 2, failed.job_id, failed.spec)
    assert retry.best == Best(10, -1.0)
    assert [each.step for each in await use_cases.training.list_checkpoints(ORGANIZATION, retry.job_id)] == [10, 5]
    model = await read_model(database, failed.model_id)
    assert (model.state, model.error) == (ModelState.CREATING, None)
    with pytest.raises(FailedPrecondition, match=retry.job_id):
        await use_cases.training.control.retry(ORGANIZATION, failed.job_id)


async def test_a_retry_knows_no_evaluation_that_comes_after_its_checkpoint(
    use_cases: UseCases, database: PostgresDatabase, queue: PostgresJobQueue
) -> None:
    lease = await start_job(database, queue)
    await queue.interrupt(lease, "killed", None)
    failed = await _fail_with_later_evaluation(database, queue)
    retry = await use_cases.training.control.retry(ORGANIZATION, failed.job_id)
    assert retry.best == Best(5, 4.0)


async def _fail_with_later_evaluation(database: PostgresDatabase, queue: PostgresJobQueue) -> Job:
    lease = (await claim(queue)).lease
    await queue.append(lease, [make_evaluation(5, 4.0)])
    await queue.record_checkpoint(lease, make_checkpoint(5), keep=2)
    await queue.append(lease, [make_evaluation(8, 2.0)])
    await queue.fail(lease, FailureReason.DISK_FULL, ErrorData("ABORTED", "DISK_FULL", "Full."))
    return await read_job(database, lease.job_id)


async def test_a_cancelled_job_is_retried_from_the_start(use_cases: UseCases, database: PostgresDatabase) -> None:
    job = await add_job(database)
    await use_cases.training.control.cancel(ORGANIZATION, job.job_id)
    retry = await use_cases.training.control.retry(ORGANIZATION, job.job_id)
    assert (retry.state, retry.attempt, retry.best) == (S.QUEUED, 2, None)


async def test_a_model_that_serves_goes_on_serving_while_its_job_is_tried_again(
    use_cases: UseCases, database: PostgresDatabase, queue: PostgresJobQueue
) -> None:
    lease = await start_job(database, queue)
    model = await read_model(database, (await read_job(database, lease.job_id)).model_id)
    await finish_job(queue, lease)
    second = await add_job(database, model)
    await change_state(database, second.job_id, S.CANCELLED)
    await use_cases.training.control.retry(ORGANIZATION, second.job_id)
    assert (await read_model(database, model.model_id)).state is ModelState.READY


async def test_what_lost_its_input_is_not_retried(use_cases: UseCases, database: PostgresDatabase, database_url: str) -> None:
    dataset = await add_dataset(database)
    tuning = await add_job(database, dataset=dataset)
    rag = await add_model(database, make_rag_model())
    index = await add_job(database, rag)
    export = await add_job(database, job=make_export(await add_model(database)))
    for job in (tuning, index, export):
        await change_state(database, job.job_id, S.CANCELLED)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.datasets.delete(dataset.dataset_id)
    for job, said in ((tuning, "no dataset"), (index, "no document left"), (export, "no model version")):
        with pytest.raises(FailedPrecondition, match=said):
            await use_cases.training.control.retry(ORGANIZATION, job.job_id)
    await add_documents(database, rag, ["more"])
    assert (await use_cases.training.control.retry(ORGANIZATION, index.job_id)).kind is JobKind.RAG_INDEX
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT count(*) FROM jobs WHERE retry_of_job_id IS NOT NULL").fetchone() == (1,)


async def test_a_cancelled_pause_gives_its_disk_space_back(
    use_cases: UseCases, database: PostgresDatabase, queue: PostgresJobQueue
) -> None:
    failed = await fail_job(database, queue, 5)
    retry = await use_cases.training.control.retry(ORGANIZATION, failed.job_id)
    (checkpoint,) = await use_cases.training.list_checkpoints(ORGANIZATION, retry.job_id)
    saved = use_cases.storage / checkpoint.path
    saved.mkdir(parents=True)
    await use_cases.training.control.pause(ORGANIZATION, retry.job_id)
    assert saved.exists()
    await use_cases.training.control.cancel(ORGANIZATION, retry.job_id)
    assert not saved.exists()
    assert await use_cases.training.list_checkpoints(ORGANIZATION, retry.job_id) == []


async def test_attempts_come_in_pages(use_cases: UseCases, database: PostgresDatabase) -> None:
    job = await add_job(database)
    for _ in range(4):
        await use_cases.training.control.pause(ORGANIZATION, job.job_id)
        await use_cases.training.control.resume(ORGANIZATION, job.job_id)
    found, token = [], ""
    while True:
        listed = await use_cases.training.list_attempts(ORGANIZATION, job.job_id, PageRequest(2, token))
        assert len(listed.items) <= 2
        found += [attempt.attempt for attempt in listed.items]
        token = listed.next_page_token
        if not token:
            break
    assert found == [5, 4, 3, 2, 1]


async def test_events_come_in_pages(use_cases: UseCases, database: PostgresDatabase) -> None:
    job = await add_job(database)
    await use_cases.training.control.pause(ORGANIZATION, job.job_id)
    events, following = await use_cases.training.list_events(ORGANIZATION, job.job_id, 0, 2)
    assert ([event.sequence for event in events], following) == ([1, 2], 2)
    events, following = await use_cases.training.list_events(ORGANIZATION, job.job_id, 2, 2)
    assert ([event.sequence for event in events], following) == ([3], None)


async def test_bad_pages_and_unknown_jobs_are_refused(use_cases: UseCases, database: PostgresDatabase) -> None:
    training, job, nobody = use_cases.training, await add_job(database), new_id(JOB)
    for request in (PageRequest(0), PageRequest(None, "rubbish")):
        with pytest.raises(InvalidInput):
            await training.list_attempts(ORGANIZATION, job.job_id, request)
    for after_sequence, page_size in ((-1, None), (0, 0), (2**40, None), (0, 10**6)):
        with pytest.raises(InvalidInput):
            await training.list_events(ORGANIZATION, job.job_id, after_sequence, page_size)
    for call in (
        training.list_attempts(ORGANIZATION, nobody, PageRequest()),
        training.list_events(ORGANIZATION, nobody, 0, None),
        training.list_checkpoints(ORGANIZATION, nobody),
        training.control.pause(ORGANIZATION, nobody),
        training.control.resume(ORGANIZATION, nobody),
        training.control.retry(ORGANIZATION, nobody),
    ):
        with pytest.raises(NotFound):
            await call
