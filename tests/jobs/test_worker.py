"""Jobs from the queue to their end, with real processes and a real database."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import psycopg
import pytest

from server.db.queue import PostgresJobQueue
from server.domain.documents import DocumentState
from server.domain.errors import ErrorData
from server.domain.jobs import FailureReason, Job, JobState
from server.domain.models import ModelState
from server.services.job_queue import ClaimLimits, Lease
from server.services.ports import Page
from tests.db import samples
from tests.jobs.child_program import Script
from tests.jobs.stage import SHORT, TERMS, Stage

S = JobState
ALL_STATES = [S.VALIDATING, S.QUEUED, S.STARTING, S.RUNNING, S.FINALIZING, S.SUCCEEDED]
SLOW = Script(steps=1000, step_seconds=0.05)


async def test_a_job_runs_to_success_and_leaves_its_result_alone(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=23))
    async with stage.working():
        ended = await stage.wait_for_end(job)
    assert ended.state is S.SUCCEEDED
    assert await stage.read_states(job) == ALL_STATES
    assert await stage.read_steps(job) == list(range(1, 24))
    assert (await samples.read_model(stage.database, job.model_id)).state is ModelState.READY
    assert [path.name for path in (stage.storage / "default/models" / job.model_id).iterdir()] == [f"{job.job_id}-1"]
    assert not (stage.storage / "default/jobs" / job.job_id).exists()


async def test_a_killed_child_goes_on_from_its_last_checkpoint_without_gap_or_duplicate(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=30, step_seconds=0.02, crash_at_step=18, crashes=2))
    async with stage.working():
        ended = await stage.wait_for_end(job)
    assert (ended.state, ended.attempt) == (S.SUCCEEDED, 3)
    assert await stage.read_steps(job) == list(range(1, 31))
    resumed = [e.payload.resumed_from_step for e in await stage.read_log(job) if e.payload.kind == "started"]
    assert resumed == [0, 15, 15]


async def test_only_two_checkpoints_lie_on_disk(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=40, step_seconds=0.02, finish_seconds=30))
    async with stage.working():
        await stage.wait_for_state(job, S.FINALIZING)
        assert sorted(p.name for p in (stage.storage / "default/jobs" / job.job_id).glob("checkpoint-*")) == [
            "checkpoint-35-1",
            "checkpoint-40-1",
        ]


async def test_a_child_that_crashes_every_time_fails_as_a_crash_loop(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=10, crash_at_step=3, crashes=100))
    async with stage.working():
        ended = await stage.wait_for_end(job)
    assert ended.error is not None
    assert (ended.state, ended.error.reason, ended.attempt) == (S.FAILED, FailureReason.CRASH_LOOP, 3)
    assert "SIGKILL" in ended.error.message
    logs = sorted(path.name for path in (stage.storage / "default/jobs" / job.job_id).iterdir())
    assert logs == ["attempt-1.log", "attempt-2.log", "attempt-3.log"]


async def test_a_typed_failure_reaches_the_owner_with_its_suggestion(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=5, failure="LOSS_NOT_FINITE"))
    async with stage.working():
        ended = await stage.wait_for_end(job)
    assert ended.error is not None
    assert (ended.state, ended.attempt) == (S.FAILED, 1)
    assert (ended.error.reason, ended.error.message) == ("LOSS_NOT_FINITE", "The loss is not a number.")
    assert ended.error.metadata == {"suggestion": "Lower the learning rate."}
    model = await samples.read_model(stage.database, job.model_id)
    assert model.state is ModelState.FAILED


async def test_memory_that_ran_out_is_a_typed_failure(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=5, failure="memory"))
    async with stage.working():
        ended = await stage.wait_for_end(job)
    assert ended.error is not None
    assert ended.error.reason == FailureReason.OUT_OF_MEMORY
    assert "batch_size" in ended.error.metadata["suggestion"]


async def test_an_unforeseen_failure_tells_the_owner_nothing_of_the_inside(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=5, failure="unforeseen"))
    async with stage.working():
        ended = await stage.wait_for_end(job)
    assert ended.error is not None
    assert ended.error.reason == FailureReason.CRASH_LOOP
    told = str([event.payload for event in await stage.read_log(job)])
    assert "secret" not in told
    assert str(stage.storage) not in told
    assert "KeyError: '/a/secret/path'" in (stage.storage / f"default/jobs/{job.job_id}/attempt-1.log").read_text()


@pytest.mark.parametrize(
    ("state", "script"),
    [
        (S.STARTING, Script(start_seconds=60)),
        (S.RUNNING, SLOW),
        (S.RUNNING, Script(steps=1000, step_seconds=0.05, is_deaf=True, has_child=True)),
        (S.FINALIZING, Script(finish_seconds=60)),
    ],
    ids=["starting", "running", "running and deaf, with a child of its own", "finalizing"],
)
async def test_a_cancelled_job_ends_and_none_of_its_processes_is_left(stage: Stage, state: JobState, script: Script) -> None:
    job = await stage.add_job(script)
    async with stage.working():
        await stage.wait_for_state(job, state)
        await stage.wait_until(lambda: _has_child(stage))
        await stage.cancel(job)
        ended = await stage.wait_for_end(job)
        await stage.assert_no_child()
    assert ended.state is S.CANCELLED
    assert (await stage.read_states(job))[-2:] == [S.CANCELLING, S.CANCELLED]
    assert not (stage.storage / "default/jobs" / job.job_id).exists()


async def _has_child(stage: Stage) -> bool:
    return (stage.storage / "pids").exists() and bool(stage.read_child_pids())


class _SlowToAnswer(PostgresJobQueue):
    """A database that writes the end of a job at once and says so late: heartbeats come in between."""

    async def fail(self, lease: Lease, reason: FailureReason, error: ErrorData) -> JobState:
        state = await super().fail(lease, reason, error)
        await asyncio.sleep(0.5)
        return state


async def test_a_job_is_cleared_up_though_its_lease_ends_with_it(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=5, failure="LOSS_NOT_FINITE"))
    async with stage.working(queue=_SlowToAnswer(stage.database)):
        await stage.wait_for_state(job, S.FAILED)
        directory = stage.storage / "default/jobs" / job.job_id
        (directory / "leftover").write_text("of the attempt")
        await stage.wait_until(lambda: _is_gone(directory / "leftover"))
    assert sorted(path.name for path in directory.iterdir()) == ["attempt-1.log", "checkpoint-5-1"], "to try again from"
    assert (await stage.read_states(job))[-1] is S.FAILED, "it was nobody else's to end again"


async def _is_gone(path: Path) -> bool:
    return not path.exists()


async def test_a_worker_that_lost_its_lease_stops_the_child_and_writes_nothing(stage: Stage) -> None:
    job = await stage.add_job(SLOW)
    async with stage.working():
        await stage.wait_for_step(job, 3)
        async with await psycopg.AsyncConnection.connect(stage.database_url, autocommit=True) as connection:
            await connection.execute("UPDATE jobs SET lease_epoch = lease_epoch + 1, lease_end_time = now() + interval '1 hour'")
        written = len(await stage.read_log(job))
        await stage.wait_for_no_child()
        await asyncio.sleep(0.3)
        assert len(await stage.read_log(job)) == written
        assert (await stage.read(job)).state is S.RUNNING


async def test_a_job_outlives_broken_database_connections(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=60, step_seconds=0.05))
    async with stage.working(), await psycopg.AsyncConnection.connect(stage.database_url, autocommit=True) as connection:
        for step in (10, 20, 30):
            await stage.wait_for_step(job, step)
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.2)
        ended = await stage.wait_for_end(job)
    assert (ended.state, ended.attempt) == (S.SUCCEEDED, 1)
    assert await stage.read_steps(job) == list(range(1, 61))


async def test_a_database_that_is_away_for_less_than_the_lease_does_no_harm(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=60, step_seconds=0.05))
    name = psycopg.conninfo.conninfo_to_dict(stage.database_url)["dbname"]
    elsewhere = psycopg.conninfo.make_conninfo(stage.database_url, dbname="postgres")
    async with (
        stage.working(),
        await psycopg.AsyncConnection.connect(elsewhere, autocommit=True) as connection,
    ):
        await stage.wait_for_step(job, 10)
        await connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        await asyncio.sleep(1.5)
        await connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        ended = await stage.wait_for_end(job)
    assert (ended.state, ended.attempt) == (S.SUCCEEDED, 1)
    assert await stage.read_steps(job) == list(range(1, 61))


async def test_a_worker_cut_off_from_the_database_stops_its_child_when_the_lease_is_over(stage: Stage) -> None:
    job = await stage.add_job(SLOW)
    async with stage.working(terms=SHORT):
        await stage.wait_for_step(job, 2)
        first = stage.read_child_pids()
        # In a transaction that holds the table: heartbeats hang until they give up.
        async with await psycopg.AsyncConnection.connect(stage.database_url) as connection:
            await connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
            assert psutil.pid_exists(first[0]), "it ends for the lease, not for the lock"
            await stage.wait_for_no_child()
            assert stage.read_child_pids() == first, "no other one begins without a claim"
        await stage.wait_until(lambda: _has_attempt(stage, job, 2))
        await stage.wait_for_state(job, S.RUNNING)
        assert stage.read_child_pids() != first
    steps = await stage.read_steps(job)
    assert steps == list(range(1, len(steps) + 1))


async def _has_attempt(stage: Stage, job: Job, attempt: int) -> bool:
    return (await stage.read(job)).attempt == attempt


async def test_shutdown_puts_the_job_back_into_the_queue_and_the_next_worker_goes_on(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=30, step_seconds=0.05))
    async with stage.working():
        await stage.wait_for_step(job, 12)
    await stage.assert_no_child()
    back = await stage.read(job)
    assert (back.state, back.attempt) == (S.QUEUED, 2)
    async with stage.working():
        ended = await stage.wait_for_end(job)
    assert ended.state is S.SUCCEEDED
    assert await stage.read_steps(job) == list(range(1, 31))
    assert [e.payload.resumed_from_step for e in await stage.read_log(job) if e.payload.kind == "started"] == [0, 10]


async def test_shutdowns_do_not_count_as_crashes(stage: Stage) -> None:
    job = await stage.add_job(SLOW)
    for attempt in range(1, 5):
        async with stage.working():
            await stage.wait_for_step(job, 2)
            await stage.wait_for_state(job, S.RUNNING)
        assert (await stage.read(job)).attempt == attempt + 1


async def test_a_killed_workers_job_dies_with_it_and_is_taken_up_again(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=60, step_seconds=0.05))
    first = stage.start_worker_process()
    try:
        await stage.wait_for_step(job, 12)
        first.kill()
        first.wait()
        await stage.wait_for_no_child()
        async with stage.working(terms=SHORT):  # which also says how often dead workers are looked for
            ended = await stage.wait_for_end(job)
    finally:
        first.kill()
        first.wait()
    assert (ended.state, ended.attempt) == (S.SUCCEEDED, 2)
    assert await stage.read_steps(job) == list(range(1, 61))


async def test_a_worker_process_ends_in_order_on_sigterm(stage: Stage) -> None:
    job = await stage.add_job(SLOW)
    process = stage.start_worker_process()
    try:
        await stage.wait_for_step(job, 2)
        os.kill(process.pid, signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        process.kill()
        process.wait()
    assert (await stage.read(job)).state is S.QUEUED
    await stage.assert_no_child()


async def test_the_limit_holds_over_all_workers(stage: Stage) -> None:
    jobs = [await stage.add_job(Script(steps=10, step_seconds=0.02)) for _ in range(6)]
    limits = ClaimLimits(training_jobs=2, index_jobs=1, batch_jobs=1)
    most_held = 0
    async with stage.working(limits), stage.working(limits), stage.working(limits):
        while True:
            states = [(await stage.read(job)).state for job in jobs]
            most_held = max(most_held, sum(state in (S.STARTING, S.RUNNING, S.FINALIZING) for state in states))
            if all(state is S.SUCCEEDED for state in states):
                break
            assert S.FAILED not in states
            await asyncio.sleep(0.01)
    assert most_held == 2


async def test_an_index_job_commits_each_document(stage: Stage) -> None:
    stage.write_script(Script())
    model = await samples.add_model(stage.database, samples.make_rag_model())
    await samples.add_documents(stage.database, model, [f"text {number}" for number in range(40)])
    job = await samples.add_job(stage.database, model)
    async with stage.working():
        ended = await stage.wait_for_end(job)
    assert (ended.state, ended.progress.step, ended.progress.total_steps) == (S.SUCCEEDED, 40, 40)
    async with stage.database.transaction(samples.ORGANIZATION) as transaction:
        assert len(await transaction.documents.list(model.model_id, Page(100), DocumentState.INDEXED)) == 40
    assert not (stage.storage / "default/jobs" / job.job_id).exists()


async def test_a_disk_that_is_full_fails_the_index_job_and_keeps_what_waits(stage: Stage) -> None:
    stage.write_script(Script())
    model = await samples.add_model(stage.database, samples.make_rag_model())
    (document_id,) = await samples.add_documents(stage.database, model, ["text"])
    job = await samples.add_job(stage.database, model)
    order = stage.storage / "default/jobs" / job.job_id / "documents-1.jsonl"
    order.parent.mkdir(parents=True)
    order.symlink_to("/dev/full")
    async with stage.working():
        ended = await stage.wait_for_end(job)
        assert ended.error is not None
        assert (ended.state, ended.error.reason) == (S.FAILED, FailureReason.DISK_FULL)
        async with stage.database.transaction(samples.ORGANIZATION) as transaction:
            assert (await transaction.documents.get(model.model_id, document_id)).state is DocumentState.PENDING
        assert (await stage.wait_for_end(await stage.retry(job))).state is S.SUCCEEDED


async def test_vectors_that_do_not_fit_fail_the_index_job_at_once(stage: Stage) -> None:
    stage.write_script(Script(dimension=4))
    model = await samples.add_model(stage.database, samples.make_rag_model())
    await samples.add_documents(stage.database, model, ["one", "two"])
    job = await samples.add_job(stage.database, model)
    async with stage.working(terms=replace(TERMS, max_attempts=100)):
        ended = await stage.wait_for_end(job)
    assert ended.error is not None
    assert (ended.state, ended.attempt, ended.error.reason) == (S.FAILED, 1, FailureReason.DOCUMENTS_INVALID)
