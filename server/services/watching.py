"""Watching a job: its log replayed and followed live, page by page as the reader takes it, so that a slow reader costs no memory."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from server.domain.events import JobEvent, StepDone
from server.domain.jobs import Job
from server.services.ports import Database, JobFeed
from server.services.validation import MAX_SEQUENCE, Violations

HEARTBEAT_SECONDS = 10.0  # below the idle time-outs of common proxies (60 s and up)
EVENTS_PER_READ = 500


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The job as it is when a watch begins."""

    job: Job


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Nothing happened for a while; the stream is alive."""

    job_id: str
    last_sequence: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The job is in a terminal state, and every event was sent."""

    job: Job


@dataclass(frozen=True, slots=True)
class CoalescedStep:
    """A step that stands for the `left_out` steps right before it, too."""

    event: JobEvent
    left_out: int


WatchItem = Snapshot | JobEvent | CoalescedStep | Heartbeat | Finished


async def watch_job(
    database: Database, feed: JobFeed, organization: str, job_id: str, after_sequence: int
) -> AsyncGenerator[WatchItem, None]:
    """Stream a snapshot, every event after `after_sequence` in order, heartbeats while idle, and the end.

    What was logged before the watch began is replayed whole. A reader who falls a page behind what comes after gets steps coalesced.
    No transaction is open between two items. Raises NotFound, InvalidInput.
    """
    found = Violations()
    found.number("after_sequence", after_sequence, 0, MAX_SEQUENCE)
    found.raise_if_any()
    async with database.transaction(organization) as transaction:
        job = await transaction.jobs.get(job_id)
    yield Snapshot(job)
    live_from, position = job.last_sequence, after_sequence
    while True:
        async with database.transaction(organization) as transaction:
            # The job first: if it is finished here, the log that is read after it is complete.
            job = await transaction.jobs.get(job_id)
            events = await transaction.jobs.list_events(job_id, position, EVENTS_PER_READ)
        is_behind = len(events) == EVENTS_PER_READ
        for item in coalesce_steps(events) if is_behind and position >= live_from else events:
            yield item
        position = events[-1].sequence if events else position
        if is_behind:
            continue
        if job.is_finished:
            yield Finished(job)
            return
        if not await feed.wait(organization, job_id, position, HEARTBEAT_SECONDS):
            yield Heartbeat(job_id, position)


def coalesce_steps(events: Sequence[JobEvent]) -> Iterator[JobEvent | CoalescedStep]:
    """Keep of each run of steps the last one, which counts the others; every other event stays."""
    left_out = 0
    for place, event in enumerate(events):
        if not isinstance(event.payload, StepDone):
            yield event
        elif place + 1 < len(events) and isinstance(events[place + 1].payload, StepDone):
            left_out += 1
        else:
            yield CoalescedStep(event, left_out) if left_out else event
            left_out = 0
