"""Batch generations under a real worker: parts, crashes, retries; with scripted children."""

from pathlib import Path

from server.db.database import PostgresDatabase
from server.domain.jobs import BatchCounters, Job, JobState
from tests.db import samples
from tests.jobs.child_program import Script
from tests.jobs.stage import Stage


async def test_a_batch_goes_on_from_its_parts_and_leaves_nothing_but_its_result(stage: Stage, database: PostgresDatabase) -> None:
    stage.write_script(Script(steps=6, crash_at_step=4))
    job = await samples.add_job(database, job=samples.make_batch(await samples.add_dataset(database)))
    async with stage.working():
        ended = await stage.wait_for_end(job)
        result = stage.storage / f"default/jobs/{job.job_id}/{job.job_id}-2"
        await stage.wait_until(lambda: _holds_only(result))
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2)
    log = await stage.read_log(job)
    assert [event.payload.resumed_from_step for event in log if event.payload.kind == "started"] == [0, 3]
    assert [event.payload.step for event in log if event.payload.kind == "checkpoint"] == [1, 2, 3, 4, 5, 6]
    assert ended.progress.batch == BatchCounters(6, 0, 18, 12)


async def _holds_only(result: Path) -> bool:
    return [path.name for path in result.parent.iterdir()] == [result.name]


async def test_a_batch_that_failed_leaves_its_parts_for_a_retry(stage: Stage, database: PostgresDatabase) -> None:
    stage.write_script(Script(steps=3, failure="DISK_FULL"))
    job = await samples.add_job(database, job=samples.make_batch(await samples.add_dataset(database)))
    async with stage.working():
        assert (await stage.wait_for_end(job)).state is JobState.FAILED
        stage.write_script(Script(steps=4))
        again = await stage.retry(job)
        assert (await stage.wait_for_end(again)).state is JobState.SUCCEEDED
        await stage.wait_until(lambda: _is_gone(stage, job))
    started = [event.payload.resumed_from_step for event in await stage.read_log(again) if event.payload.kind == "started"]
    assert started == [3]


async def _is_gone(stage: Stage, job: Job) -> bool:
    return stage.list_checkpoints(job) == []
