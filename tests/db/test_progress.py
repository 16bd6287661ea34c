"""What events do to progress, best and usage, and that a repeated step is logged once."""

import pytest

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.events import CheckpointSaved, Evaluated, LoggedPayload, Sampled, Started, StateChanged, StepDone
from server.domain.jobs import Best, JobState, Progress
from tests.db.samples import claim, make_checkpoint, make_evaluation, make_step, read_job, read_log, start_job


async def test_events_are_the_progress_of_the_job(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.append(lease, [Started(100, 0, 90, 10)])
    assert (await read_job(database, lease.job_id)).progress == Progress(total_steps=100)
    await queue.append(lease, [make_step(1), make_step(2), make_evaluation(2, 2.5)])
    job = await read_job(database, lease.job_id)
    assert job.progress == Progress(2, 100, 0.02, 200, 250.0, 98.0, 2.98)
    assert (job.best, job.last_step, job.usage.tokens, job.usage.peak_memory_bytes) == (Best(2, 2.5), 2, 200, 20)


async def test_the_best_evaluation_is_kept(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.append(lease, [make_evaluation(0, 1.0, best=False), make_evaluation(5, 1.5)])
    await queue.append(lease, [make_evaluation(10, 2.0, best=False)])
    assert (await read_job(database, lease.job_id)).best == Best(5, 1.5)


async def test_what_a_resumed_child_repeats_is_logged_once(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    first: list[LoggedPayload] = [make_evaluation(0, 3.0), *(make_step(step) for step in range(1, 8)), make_evaluation(5, 2.0)]
    lease = await start_job(database, queue)
    await queue.append(lease, first)
    await queue.record_checkpoint(lease, make_checkpoint(5), keep=1)
    await queue.interrupt(lease, "the child was killed", 3)
    lease = (await claim(queue)).lease
    await queue.change_state(lease, JobState.RUNNING, "")
    await queue.append(lease, [make_evaluation(0, 3.0), make_step(6), make_evaluation(5, 2.0), make_step(7), make_step(8)])
    await queue.record_checkpoint(lease, make_checkpoint(5, epoch=2), keep=1)
    log = await read_log(database, lease.job_id)
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    told = [(event.payload.kind, event.payload.step) for event in log if isinstance(event.payload, StepDone | Evaluated | CheckpointSaved)]
    assert told == [
        ("evaluation", 0),
        *(("step", step) for step in range(1, 8)),
        ("evaluation", 5),
        ("checkpoint", 5),
        ("step", 8),
    ]


async def test_samples_that_a_resumed_child_repeats_are_logged_once(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    samples = [Sampled(step, prompt, f"answer {step}") for step in (0, 5) for prompt in ("Who?", "Where?")]
    lease = await start_job(database, queue)
    await queue.append(lease, [*samples[:2], *(make_step(step) for step in range(1, 6)), samples[2]])
    await queue.append(lease, [*samples[:2], *(make_step(step) for step in range(1, 6)), *samples[2:], make_step(6)])
    told = [event.payload for event in await read_log(database, lease.job_id) if isinstance(event.payload, Sampled)]
    assert told == samples


async def test_a_repetition_alone_writes_nothing(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.append(lease, [make_step(1), make_evaluation(1, 2.0)])
    before = await read_job(database, lease.job_id)
    await queue.append(lease, [make_step(1), make_evaluation(1, 2.0)])
    await queue.append(lease, [])
    after = await read_job(database, lease.job_id)
    assert (after.update_time, after.last_sequence) == (before.update_time, before.last_sequence)


async def test_progress_does_not_go_back_when_a_child_starts_again(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.append(lease, [Started(100), make_step(7)])
    await queue.append(lease, [Started(100, resumed_from_step=5), make_step(6)])
    assert (await read_job(database, lease.job_id)).progress.step == 7


async def test_a_checkpoint_is_an_event(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.record_checkpoint(lease, make_checkpoint(5), keep=1)
    assert (await read_log(database, lease.job_id))[-1].payload == CheckpointSaved(5, make_checkpoint(5).path, 1_000)


async def test_a_state_change_cannot_be_appended(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    with pytest.raises(ValueError, match="moving the job"):
        await queue.append(lease, [StateChanged(JobState.SUCCEEDED)])
    assert (await read_job(database, lease.job_id)).state is JobState.RUNNING
