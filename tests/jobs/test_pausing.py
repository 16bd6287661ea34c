"""Pausing and resuming, trying again, and exports: with real processes and a real database."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from server.db.database import PostgresDatabase
from server.domain.jobs import FailureReason, Job, JobState
from server.domain.models import ModelState
from server.domain.specs import ExportFormat, ExportSpec
from tests.db import samples
from tests.jobs.child_program import Script
from tests.jobs.stage import Stage

S = JobState
SLOW = Script(steps=1000, step_seconds=0.05, checkpoint_every=10_000)


async def _resumed_from(stage: Stage, job: Job) -> list[int]:
    return [event.payload.resumed_from_step for event in await stage.read_log(job) if event.payload.kind == "started"]


async def test_a_paused_job_saves_where_it_is_and_goes_on_from_there(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=40, step_seconds=0.05, checkpoint_every=10_000))
    other = await stage.add_job(Script(steps=40, step_seconds=0.05, checkpoint_every=10_000))
    async with stage.working():
        await stage.wait_for_step(job, 6)
        assert (await stage.pause(job)).state is S.PAUSING
        assert (await stage.pause(job)).state is S.PAUSING
        paused = await stage.wait_for_state(job, S.PAUSED)
        saved = paused.last_step
        assert stage.list_checkpoints(job) == [f"checkpoint-{saved}-1"]
        # Its place is free: the limit is one job.
        await stage.wait_for_state(other, S.RUNNING)
        resumed = await stage.resume(job)
        assert (resumed.state, resumed.attempt) == (S.QUEUED, 2)
        ended = await stage.wait_for_end(job)
    assert ended.state is S.SUCCEEDED
    assert await _resumed_from(stage, job) == [0, saved]
    assert 6 <= saved < 40
    assert await stage.read_steps(job) == list(range(1, 41))
    assert (await stage.read_states(job))[2:9] == [S.STARTING, S.RUNNING, S.PAUSING, S.PAUSED, S.QUEUED, S.STARTING, S.RUNNING]


async def test_a_paused_job_holds_no_process(stage: Stage) -> None:
    job = await stage.add_job(SLOW)
    async with stage.working():
        await stage.wait_for_step(job, 3)
        await stage.pause(job)
        await stage.wait_for_state(job, S.PAUSED)
        await stage.assert_no_child()
        assert (await stage.pause(job)).state is S.PAUSED


async def test_a_job_that_has_not_begun_to_train_pauses_at_once(stage: Stage) -> None:
    job = await stage.add_job(Script(start_seconds=60))
    async with stage.working():
        await stage.wait_for_state(job, S.STARTING)
        await stage.wait_until(lambda: _has_child(stage))
        await stage.pause(job)
        async with asyncio.timeout(10):
            await stage.wait_for_state(job, S.PAUSED)
        await stage.assert_no_child()


async def _has_child(stage: Stage) -> bool:
    return (stage.storage / "pids").exists() and bool(stage.read_child_pids())


async def test_a_queued_job_pauses_without_a_worker_and_keeps_its_place(stage: Stage) -> None:
    first, second = await stage.add_job(SLOW), await stage.add_job(SLOW)
    assert (await stage.pause(first)).state is S.PAUSED
    assert (await stage.read(second)).queue_position == 1
    resumed = await stage.resume(first)
    assert (resumed.state, resumed.queue_position) == (S.QUEUED, 1)


@pytest.mark.parametrize("script", [{"ignores_pause": True}, {"ignores_pause": True, "is_deaf": True}, {"dies_of_pause": True}], ids=str)
async def test_a_child_that_does_not_obey_is_paused_at_its_last_checkpoint(stage: Stage, script: dict[str, bool]) -> None:
    job = await stage.add_job(Script(steps=1000, step_seconds=0.05, checkpoint_every=5, **script))  # type: ignore[arg-type]  # flags
    async with stage.working(pause_grace_seconds=0.5):
        await stage.wait_for_step(job, 6)
        await stage.pause(job)
        paused = await stage.wait_for_state(job, S.PAUSED)
        await stage.assert_no_child()
    assert paused.attempt == 1
    async with stage.database.transaction(samples.ORGANIZATION) as transaction:
        latest = (await transaction.jobs.list_checkpoints(job.job_id))[0]
    assert latest.step >= 5
    assert (stage.storage / latest.path / "step").read_text() == str(latest.step)


async def test_a_child_that_is_killed_while_it_pauses_leaves_the_job_paused(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=1000, step_seconds=0.05, checkpoint_every=5, ignores_pause=True))
    async with stage.working():
        await stage.wait_for_step(job, 6)
        await stage.pause(job)
        os.kill(stage.read_child_pids()[0], signal.SIGKILL)
        await stage.wait_for_state(job, S.PAUSED)
        stage.write_script(Script(steps=12, step_seconds=0.0))
        await stage.resume(job)
        ended = await stage.wait_for_end(job)
    assert (ended.state, ended.attempt) == (S.SUCCEEDED, 2)


async def test_a_cancel_wins_over_a_pause(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=1000, step_seconds=0.05, ignores_pause=True))
    async with stage.working():
        await stage.wait_for_step(job, 3)
        await stage.pause(job)
        await stage.control.cancel(samples.ORGANIZATION, job.job_id)
        async with asyncio.timeout(10):
            ended = await stage.wait_for_end(job)
        await stage.assert_no_child()
    assert ended.state is S.CANCELLED
    assert not (stage.storage / "default/jobs" / job.job_id).exists()


async def test_a_job_that_is_done_before_it_hears_of_the_pause_succeeds(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=10, step_seconds=0.05, ignores_pause=True, finish_seconds=2.0))
    async with stage.working(pause_grace_seconds=0.9):
        await stage.wait_for_step(job, 1)
        await stage.pause(job)
        ended = await stage.wait_for_end(job)
    assert (ended.state, ended.attempt) == (S.SUCCEEDED, 1)


async def test_a_paused_job_that_is_cancelled_leaves_no_checkpoint(stage: Stage) -> None:
    job = await stage.add_job(SLOW)
    async with stage.working():
        await stage.wait_for_step(job, 3)
        await stage.pause(job)
        await stage.wait_for_state(job, S.PAUSED)
    assert stage.list_checkpoints(job)
    assert (await stage.control.cancel(samples.ORGANIZATION, job.job_id)).state is S.CANCELLED
    assert stage.list_checkpoints(job) == []


async def test_a_retry_goes_on_from_the_checkpoint_of_the_failed_job(stage: Stage) -> None:
    failed = await stage.add_job(Script(steps=12, failure="DISK_FULL"))
    async with stage.working():
        await stage.wait_for_state(failed, S.FAILED)
        await stage.wait_until(lambda: _has_only_for_retry(stage, failed))
        stage.write_script(Script(steps=30))
        retry = await stage.retry(failed)
        assert (retry.attempt, retry.retry_of_job_id, retry.spec) == (2, failed.job_id, failed.spec)
        assert (await samples.read_model(stage.database, failed.model_id)).state is ModelState.CREATING
        ended = await stage.wait_for_end(retry)
        await stage.wait_until(lambda: _is_gone(stage.storage / "default/jobs" / retry.job_id))
    assert ended.state is S.SUCCEEDED
    assert await _resumed_from(stage, retry) == [10]
    assert await stage.read_steps(retry) == list(range(11, 31))
    assert (await samples.read_model(stage.database, failed.model_id)).state is ModelState.READY
    assert stage.list_checkpoints(failed) == []


async def _has_only_for_retry(stage: Stage, job: Job) -> bool:
    names = {path.name for path in (stage.storage / "default/jobs" / job.job_id).iterdir()}
    return names == {"attempt-1.log", "checkpoint-10-1", "checkpoint-5-1"}


async def _is_gone(path: Path) -> bool:
    return not path.exists()


async def test_memory_that_ran_out_twice_in_a_row_ends_the_job_with_advice(stage: Stage) -> None:
    kills = iter(range(1000))
    job = await stage.add_job(Script(steps=10, crash_at_step=3, crashes=100))
    async with stage.working(count_kills=lambda: next(kills)):
        ended = await stage.wait_for_end(job)
    assert ended.error is not None
    assert (ended.state, ended.attempt, ended.error.reason) == (S.FAILED, 2, FailureReason.OUT_OF_MEMORY)
    assert "memory ran out" in ended.error.message
    assert "batch_size" in ended.error.metadata["suggestion"]


async def test_reading_records_does_not_flood_the_log(stage: Stage) -> None:
    job = await stage.add_job(Script(steps=1, preparing_events=5_000))
    async with stage.working():
        await stage.wait_for_end(job)
    kinds = [event.payload.kind for event in await stage.read_log(job)]
    assert 1 <= kinds.count("preparing") <= 3


async def _add_export(stage: Stage, database: PostgresDatabase) -> Job:
    """Store a model with a version and a job that exports it."""
    lease = await samples.start_job(database, stage.queue)
    await samples.finish_job(stage.queue, lease)
    trained = await stage.read(await samples.read_job(database, lease.job_id))
    model = await samples.read_model(database, trained.model_id)
    export = samples.make_export(model)
    async with database.transaction(samples.ORGANIZATION) as transaction:
        await transaction.jobs.insert(export)
    return export


async def test_an_export_runs_as_a_trainer_and_leaves_its_result(stage: Stage, database: PostgresDatabase) -> None:
    stage.write_script(Script())
    job = await _add_export(stage, database)
    async with stage.working():
        assert (await stage.wait_for_end(job)).state is S.SUCCEEDED
    assert isinstance(job.spec, ExportSpec)
    assert job.spec.format in ExportFormat
    assert (stage.storage / "default/models" / job.model_id / f"{job.job_id}-1/adapter_model.safetensors").exists()


@pytest.mark.parametrize("failure", ["ARTIFACT_INVALID", "unforeseen"])
async def test_an_export_that_fails_leaves_its_model_as_it_was(stage: Stage, database: PostgresDatabase, failure: str) -> None:
    stage.write_script(Script(failure=failure))
    job = await _add_export(stage, database)
    before = await samples.read_model(database, job.model_id)
    async with stage.working():
        assert (await stage.wait_for_end(job)).state is S.FAILED
    assert await samples.read_model(database, job.model_id) == before


async def test_an_export_whose_version_is_gone_says_so_at_once(stage: Stage, database: PostgresDatabase) -> None:
    stage.write_script(Script())
    job = await _add_export(stage, database)
    async with database.begin() as connection:
        await connection.exec_driver_sql("DELETE FROM model_versions")
    async with stage.working():
        ended = await stage.wait_for_end(job)
    assert ended.error is not None
    assert (ended.attempt, ended.error.reason) == (1, FailureReason.ARTIFACT_INVALID)
