"""Rows of jobs and their log, as the api reads and changes them."""

import itertools
from dataclasses import replace

import psycopg
import pytest
from psycopg.rows import TupleRow

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.errors import FailedPrecondition, NotFound
from server.domain.events import LoggedPayload, Started, StateChanged, Warned
from server.domain.ids import DATASET, JOB, MODEL, new_id
from server.domain.jobs import Job, JobKind, JobState, may_follow
from server.domain.specs import FineTuneSpec
from server.services.ports import JobFilter, Page
from tests.db.samples import (
    ORGANIZATION,
    add_dataset,
    add_job,
    add_model,
    change_state,
    claim,
    finish_job,
    make_checkpoint,
    make_evaluation,
    make_job,
    make_model,
    make_rag_model,
    make_step,
    read_job,
    read_log,
    start_job,
)


async def test_a_job_comes_back_as_it_was_stored(database: PostgresDatabase) -> None:
    dataset = await add_dataset(database)
    for model in (make_model(), make_rag_model()):
        await add_model(database, model)
        job = await add_job(database, model, dataset=dataset)
        stored = await read_job(database, job.job_id)
        assert stored == replace(job, queue_position=1, last_sequence=2, update_time=stored.update_time)


async def test_a_new_job_logs_its_first_states(database: PostgresDatabase) -> None:
    job = await add_job(database)
    log = await read_log(database, job.job_id)
    assert [(event.sequence, event.attempt) for event in log] == [(1, 1), (2, 1)]
    assert [event.payload for event in log] == [
        StateChanged(JobState.VALIDATING),
        StateChanged(JobState.QUEUED, from_state=JobState.VALIDATING),
    ]


async def test_a_job_of_what_is_gone_is_not_found(database: PostgresDatabase) -> None:
    model, dataset = await add_model(database), await add_dataset(database)
    lost = make_job(make_model(), dataset)
    without_dataset = make_job(model, replace(dataset, dataset_id=new_id(DATASET)))
    spec = make_job(model, dataset).spec
    assert isinstance(spec, FineTuneSpec)
    without_evaluation = replace(make_job(model, dataset), spec=replace(spec, eval_dataset_id=new_id(DATASET)))
    for job, kind in ((lost, "model"), (without_dataset, "dataset"), (without_evaluation, "dataset")):
        with pytest.raises(NotFound, match=f"no {kind}"):
            async with database.transaction(ORGANIZATION) as transaction:
                await transaction.jobs.insert(job)


async def test_the_position_counts_the_jobs_ahead_in_the_same_queue(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    first, second = await add_job(database), await add_job(database)
    elsewhere = await add_job(database, organization="other")
    index = await add_job(database, await add_model(database, make_rag_model()))
    third = await add_job(database, kind=JobKind.EXPORT)
    last_but_one, last = sorted([first, second, elsewhere, third], key=lambda job: job.job_id)[2:]
    assert (await read_job(database, index.job_id)).queue_position == 1
    ours = {job.job_id: job.queue_position for job in (last_but_one, last) for job in [await _read_any(database, job)]}
    assert ours == {last_but_one.job_id: 3, last.job_id: 4}
    claimed = await claim(queue)
    assert claimed.job.queue_position is None
    assert (await _read_any(database, last)).queue_position == 3


async def _read_any(database: PostgresDatabase, job: Job) -> Job:
    for organization in (ORGANIZATION, "other"):
        async with database.transaction(organization) as transaction:
            for found in await transaction.jobs.list(JobFilter(), Page(100)):
                if found.job_id == job.job_id:
                    return found
    raise AssertionError(job.job_id)


async def test_filters_choose_jobs(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    tuning = await add_job(database)
    index = await add_job(database, await add_model(database, make_rag_model()))
    cancelled = await add_job(database)
    await change_state(database, cancelled.job_id, JobState.CANCELLED)

    async def find(where: JobFilter) -> set[str]:
        async with database.transaction(ORGANIZATION) as transaction:
            return {job.job_id for job in await transaction.jobs.list(where, Page(10))}

    assert await find(JobFilter()) == {tuning.job_id, index.job_id, cancelled.job_id}
    assert await find(JobFilter(state=JobState.QUEUED)) == {tuning.job_id, index.job_id}
    assert await find(JobFilter(kind=JobKind.RAG_INDEX)) == {index.job_id}
    assert await find(JobFilter(model_id=tuning.model_id)) == {tuning.job_id}
    assert await find(JobFilter(model_id=tuning.model_id, state=JobState.FAILED)) == set()
    assert await find(JobFilter(model_id="no id\0")) == set()


async def test_pages_are_newest_first_and_stable_while_jobs_are_added(database: PostgresDatabase) -> None:
    ids = [(await add_job(database)).job_id for _ in range(5)]
    async with database.transaction(ORGANIZATION) as transaction:
        first = [job.job_id for job in await transaction.jobs.list(JobFilter(), Page(2))]
    await add_job(database)
    async with database.transaction(ORGANIZATION) as transaction:
        rest = [job.job_id for job in await transaction.jobs.list(JobFilter(), Page(9, first[-1]))]
    assert first + rest == sorted(ids, reverse=True)


async def test_the_transition_table_holds_for_the_api(database: PostgresDatabase, sql: psycopg.Connection[TupleRow]) -> None:
    job_id = (await add_job(database)).job_id
    for before, after in itertools.product(JobState, JobState):
        sql.execute("UPDATE jobs SET state = %s, lease_start_time = now()", (before,))
        length = (await read_job(database, job_id)).last_sequence
        moved = may_follow(before, after)
        if moved:
            await change_state(database, job_id, after)
        else:
            with pytest.raises(FailedPrecondition, match=f"is {before}"):
                await change_state(database, job_id, after)
        job = await read_job(database, job_id)
        assert (job.state, job.last_sequence) == (after if moved else before, length + moved)
        if moved:
            last = (await read_log(database, job_id))[-1]
            assert (last.sequence, last.payload) == (job.last_sequence, StateChanged(after, "asked for", from_state=before))


async def test_a_finished_job_has_its_end_and_no_lease(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    running = await read_job(database, lease.job_id)
    assert running.start_time is not None
    assert running.end_time is None
    await finish_job(queue, lease)
    job = await read_job(database, lease.job_id)
    assert job.end_time is not None
    assert 0 < job.usage.compute_seconds == pytest.approx((job.end_time - running.start_time).total_seconds(), abs=0.01)


async def test_active_jobs_are_found_by_model_base_generator_and_dataset(database: PostgresDatabase) -> None:
    dataset, generator = await add_dataset(database), await add_model(database)
    tuning = await add_job(database, dataset=dataset)
    on_top = await add_job(database, await add_model(database, replace(make_model(), base_model=generator.model_id)))
    index = await add_job(database, await add_model(database, make_rag_model(generator.model_id)))

    async def find(*, model_id: str | None = None, dataset_id: str | None = None) -> set[str]:
        async with database.transaction(ORGANIZATION) as transaction:
            return set(await transaction.jobs.list_active(model_id=model_id, dataset_id=dataset_id))

    assert await find(model_id=tuning.model_id) == {tuning.job_id}
    assert await find(model_id=generator.model_id) == {on_top.job_id, index.job_id}
    assert await find(dataset_id=dataset.dataset_id) == {tuning.job_id}
    assert await find(model_id=new_id(MODEL)) == await find(dataset_id="\0") == await find() == set()
    await change_state(database, tuning.job_id, JobState.CANCELLED)
    assert await find(dataset_id=dataset.dataset_id) == set()


async def test_events_are_read_in_order_after_a_sequence(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    payloads: list[LoggedPayload] = [Started(3), make_step(1), Warned("SLOW", "بطيء"), make_step(2)]
    await queue.append(lease, payloads)
    async with database.transaction(ORGANIZATION) as transaction:
        events = await transaction.jobs.list_events(lease.job_id, 4, 3)
        assert [event.sequence for event in events] == [5, 6, 7]
        assert [event.payload for event in events] == payloads[:3]
        assert [event.sequence for event in await transaction.jobs.list_events(lease.job_id, -5, 2)] == [1, 2]
        assert await transaction.jobs.list_events(lease.job_id, 2**40, 10) == []


async def test_a_curve_is_thinned_evenly_and_keeps_its_last_point(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.append(lease, [make_step(step) for step in range(1, 101)])
    await queue.append(lease, [make_evaluation(step, 2.0) for step in range(0, 101, 10)])
    async with database.transaction(ORGANIZATION) as transaction:
        for most in (1, 7, 50, 99, 100, 1_000):
            steps = [step.step for step in await transaction.jobs.list_steps(lease.job_id, most)]
            assert len(steps) <= most
            assert steps[-1] == 100
            assert len({after - before for before, after in itertools.pairwise(steps)}) <= 1
        assert [step.step for step in await transaction.jobs.list_steps(lease.job_id, 4)] == [25, 50, 75, 100]
        assert await transaction.jobs.list_steps(lease.job_id, 100) == [make_step(step) for step in range(1, 101)]
        assert [point.step for point in await transaction.jobs.list_evaluations(lease.job_id, 100)] == list(range(0, 101, 10))
        assert [point.step for point in await transaction.jobs.list_evaluations(lease.job_id, 2)] == [40, 100]
        assert await transaction.jobs.list_steps(lease.job_id, 0) == []


async def test_checkpoints_are_listed_latest_first(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    for step in (5, 10):
        await queue.record_checkpoint(lease, make_checkpoint(step), keep=2)
    async with database.transaction(ORGANIZATION) as transaction:
        found = await transaction.jobs.list_checkpoints(lease.job_id)
    assert [checkpoint.path for checkpoint in found] == [
        make_checkpoint(10).path,
        make_checkpoint(5).path,
    ]
    assert [checkpoint.eval_loss for checkpoint in found] == [1.25, 1.25]


@pytest.mark.parametrize("missing", [new_id(JOB), "", "job_", "job_../../x", "job_\0", "\ud800"])
async def test_a_job_that_is_not_there_is_not_found(database: PostgresDatabase, missing: str) -> None:
    async with database.transaction(ORGANIZATION) as transaction:
        for wanted in (transaction.jobs.get(missing, lock=True), transaction.jobs.change_state(missing, JobState.CANCELLED, "")):
            with pytest.raises(NotFound):
                await wanted
        assert await transaction.jobs.list_events(missing, 0, 10) == []
        assert await transaction.jobs.list_steps(missing, 10) == []
        assert await transaction.jobs.list_checkpoints(missing) == []
