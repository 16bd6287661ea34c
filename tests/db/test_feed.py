"""Watchers hear of a longer log soon, without asking each for themselves."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest
from psycopg.rows import TupleRow
from sqlalchemy import Engine, event

from server.db.database import PostgresDatabase
from server.db.feed import POLL_SECONDS, PostgresJobFeed
from server.db.queue import PostgresJobQueue
from server.domain.jobs import JobState
from tests.db.samples import ORGANIZATION, make_step, read_job, start_job


@pytest.fixture
def looks() -> Iterator[list[float]]:
    """When the feed asked the database."""
    times: list[float] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("SELECT jobs.organization, jobs.job_id, jobs.last_sequence"):
            times.append(time.monotonic())

    event.listen(Engine, "before_cursor_execute", note)
    yield times
    event.remove(Engine, "before_cursor_execute", note)


async def test_a_watcher_hears_of_a_step_within_a_poll(database: PostgresDatabase, queue: PostgresJobQueue, feed: PostgresJobFeed) -> None:
    lease = await start_job(database, queue)
    watching = asyncio.create_task(feed.wait(ORGANIZATION, lease.job_id, 4, 10))
    await asyncio.sleep(0.1)
    assert not watching.done()
    await queue.append(lease, [make_step(1)])
    assert await asyncio.wait_for(watching, POLL_SECONDS * 8)


async def test_a_changed_state_is_heard_before_the_next_poll(
    database: PostgresDatabase, queue: PostgresJobQueue, feed: PostgresJobFeed, looks: list[float]
) -> None:
    lease = await start_job(database, queue)
    assert not await feed.wait(ORGANIZATION, lease.job_id, 4, POLL_SECONDS * 3)
    looks.clear()
    watching = asyncio.create_task(feed.wait(ORGANIZATION, lease.job_id, 4, 10))
    while not looks:  # noqa: ASYNC110 - the listener that notes a look runs in no task of ours
        await asyncio.sleep(0.005)
    await queue.change_state(lease, JobState.FINALIZING, "")
    assert await asyncio.wait_for(watching, 5)
    assert len(looks) == 1


async def test_a_log_that_is_longer_already_is_told_at_once(
    database: PostgresDatabase, queue: PostgresJobQueue, feed: PostgresJobFeed
) -> None:
    lease = await start_job(database, queue)
    assert await feed.wait(ORGANIZATION, lease.job_id, 3, 10)


async def test_the_timeout_ends_the_wait(database: PostgresDatabase, queue: PostgresJobQueue, feed: PostgresJobFeed) -> None:
    lease = await start_job(database, queue)
    assert not await feed.wait(ORGANIZATION, lease.job_id, 4, 0.05)
    assert not await feed.wait(ORGANIZATION, "job_unknown", 0, 0.05)


async def test_another_organization_hears_nothing(database: PostgresDatabase, queue: PostgresJobQueue, feed: PostgresJobFeed) -> None:
    lease = await start_job(database, queue)
    watching = asyncio.create_task(feed.wait("other", lease.job_id, 0, POLL_SECONDS * 3))
    await queue.change_state(lease, JobState.FINALIZING, "")
    assert not await watching


async def test_one_query_serves_all_watchers_and_none_is_made_without(
    database: PostgresDatabase, queue: PostgresJobQueue, feed: PostgresJobFeed, looks: list[float]
) -> None:
    leases = [await start_job(database, queue) for _ in range(3)]
    watching = [asyncio.create_task(feed.wait(ORGANIZATION, leases[number % 3].job_id, 4, 20)) for number in range(60)]
    await asyncio.sleep(POLL_SECONDS * 3)
    assert 1 <= len(looks) <= 4
    for lease in leases:
        await queue.append(lease, [make_step(1)])
    assert await asyncio.gather(*watching) == [True] * 60
    await asyncio.sleep(POLL_SECONDS * 2)
    looks.clear()
    await asyncio.sleep(POLL_SECONDS * 3)
    assert looks == []


async def test_watching_survives_the_loss_of_every_connection(
    database: PostgresDatabase, queue: PostgresJobQueue, feed: PostgresJobFeed, sql: psycopg.Connection[TupleRow]
) -> None:
    lease = await start_job(database, queue)
    watching = asyncio.create_task(feed.wait(ORGANIZATION, lease.job_id, 4, 20))
    await asyncio.sleep(0.1)
    sql.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await queue.append(lease, [make_step(1)])
    assert await watching


async def test_reading_after_each_wait_misses_nothing(database: PostgresDatabase, queue: PostgresJobQueue, feed: PostgresJobFeed) -> None:
    lease = await start_job(database, queue)
    started = await read_job(database, lease.job_id)
    assert replace(started, last_sequence=4) == started

    async def train() -> None:
        for step in range(1, 41):
            await queue.append(lease, [make_step(step)])
            await asyncio.sleep(0.01)

    training = asyncio.create_task(train())
    position, seen = 4, []
    while position < 44:
        assert await feed.wait(ORGANIZATION, lease.job_id, position, 10)
        async with database.transaction(ORGANIZATION) as transaction:
            events = await transaction.jobs.list_events(lease.job_id, position, 10)
        seen += [each.sequence for each in events]
        position = seen[-1]
    await training
    assert seen == list(range(5, 45))
