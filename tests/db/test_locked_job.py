"""The log has no gap and no duplicate, whoever writes to a job at once."""

import asyncio
import itertools

import psycopg
from psycopg.rows import TupleRow

from server.db.database import PostgresDatabase
from server.db.locked_job import JOBS_CHANNEL
from server.db.queue import PostgresJobQueue
from server.domain.events import StepDone, Warned
from server.domain.jobs import JobState
from tests.db.samples import change_state, make_checkpoint, make_step, read_job, read_log, start_job


async def test_writers_at_once_leave_neither_gap_nor_duplicate(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)

    async def warn(number: int) -> None:
        for place in range(5):
            await queue.append(lease, [Warned("W", f"{number}.{place}"), Warned("W", "again")])

    async def train() -> None:
        for step in range(1, 21):
            await queue.append(lease, [make_step(step)])

    async def save() -> None:
        for step in (5, 10):
            await queue.record_checkpoint(lease, make_checkpoint(step), keep=1)

    async def stop() -> None:
        await asyncio.sleep(0.05)
        await change_state(database, lease.job_id, JobState.CANCELLING)

    await asyncio.gather(train(), save(), stop(), *(warn(number) for number in range(5)))
    log, job = await read_log(database, lease.job_id), await read_job(database, lease.job_id)
    assert [event.sequence for event in log] == list(range(1, job.last_sequence + 1))
    assert len(log) == 4 + 20 + 2 + 1 + 50
    assert [event.payload.step for event in log if isinstance(event.payload, StepDone)] == list(range(1, 21))
    assert all(before.time <= after.time for before, after in itertools.pairwise(log))


async def test_a_reader_never_sees_a_later_event_before_an_earlier_one(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    writers = asyncio.gather(*(queue.append(lease, [Warned("W", str(number))]) for number in range(60)))
    seen = 0
    while seen < 64:
        log = await read_log(database, lease.job_id)
        assert [event.sequence for event in log] == list(range(1, len(log) + 1))
        seen = len(log)
    await writers


async def test_a_write_that_is_rolled_back_uses_no_number(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    try:
        async with database.transaction(lease.organization) as transaction:
            await transaction.jobs.change_state(lease.job_id, JobState.CANCELLING, "")
            raise KeyError("the request fails")
    except KeyError:
        await queue.append(lease, [make_step(1)])
    log = await read_log(database, lease.job_id)
    assert [event.sequence for event in log] == list(range(1, 6))
    assert log[-1].payload == make_step(1)


async def test_only_changed_states_are_notified(
    database: PostgresDatabase, queue: PostgresJobQueue, sql: psycopg.Connection[TupleRow]
) -> None:
    sql.execute(f"LISTEN {JOBS_CHANNEL}")
    lease = await start_job(database, queue)
    await queue.append(lease, [make_step(1), make_step(2)])
    await queue.record_checkpoint(lease, make_checkpoint(1), keep=1)
    await queue.heartbeat(lease, 30)
    notices = [notice.payload for notice in sql.notifies(timeout=0.3)]
    assert notices == [f'["default", "{lease.job_id}", {sequence}]' for sequence in (2, 3, 4)]
