"""Watching: nothing lost in a replay, steps coalesced for a reader who falls behind what comes live, the end never dropped."""

from server.db.database import PostgresDatabase
from server.db.feed import PostgresJobFeed
from server.db.queue import PostgresJobQueue
from server.domain.events import JobEvent, StepDone
from server.services.watching import EVENTS_PER_READ, CoalescedStep, Finished, Snapshot, WatchItem, watch_job
from tests.db.samples import ORGANIZATION, finish_job, make_evaluation, make_step, start_job

STEPS = 3 * EVENTS_PER_READ


def stored(items: list[WatchItem]) -> list[JobEvent]:
    return [item.event if isinstance(item, CoalescedStep) else item for item in items if isinstance(item, JobEvent | CoalescedStep)]


async def test_a_replay_gives_every_event_without_gap(database: PostgresDatabase) -> None:
    queue, feed = PostgresJobQueue(database), PostgresJobFeed(database)
    lease = await start_job(database, queue)
    await queue.append(lease, [make_step(step, STEPS) for step in range(1, STEPS + 1)])
    await finish_job(queue, lease)
    items = [item async for item in watch_job(database, feed, ORGANIZATION, lease.job_id, 3)]
    numbers = [event.sequence for event in stored(items)]
    assert numbers == list(range(4, 4 + len(numbers)))
    assert isinstance(items[0], Snapshot)
    assert isinstance(items[-1], Finished)
    assert not any(isinstance(item, CoalescedStep) for item in items)
    await feed.close()


async def test_a_reader_who_falls_behind_gets_steps_coalesced_and_nothing_else_dropped(database: PostgresDatabase) -> None:
    queue, feed = PostgresJobQueue(database), PostgresJobFeed(database)
    lease = await start_job(database, queue)
    watch = watch_job(database, feed, ORGANIZATION, lease.job_id, 0)
    items: list[WatchItem] = [await anext(watch)]  # the reader is here, and does not read on
    for start in range(0, STEPS, 100):
        steps = [make_step(step, STEPS) for step in range(start + 1, start + 101)]
        await queue.append(lease, [*steps, make_evaluation(start + 100, 1.0)])
    await finish_job(queue, lease)
    items += [item async for item in watch]
    kept = [event.payload.step for event in stored(items) if isinstance(event.payload, StepDone)]
    left_out = sum(item.left_out for item in items if isinstance(item, CoalescedStep))
    assert left_out > STEPS / 2
    assert len(kept) + left_out == STEPS
    assert kept == sorted(kept)
    others = [event.payload.kind for event in stored(items) if not isinstance(event.payload, StepDone)]
    assert others.count("evaluation") == STEPS // 100
    assert others.count("state_changed") == 6
    assert isinstance(items[-1], Finished)
    await feed.close()
