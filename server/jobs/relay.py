"""Carries what a child says into the database, in order and in batches, each write under the job's lease."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

from server.domain.errors import Unavailable
from server.domain.events import (
    BatchAdvanced,
    CheckpointSaved,
    ChildEvent,
    DataChecked,
    DocumentIndexed,
    Evaluated,
    Failed,
    Finalizing,
    IndexAdvanced,
    LoggedPayload,
    Paused,
    Preparing,
    ResultReady,
    Sampled,
    SpaceFound,
    Started,
    StepDone,
    Warned,
)
from server.domain.jobs import Checkpoint, IndexCounters, JobState
from server.domain.rag_indexes import MeasuredSpace
from server.jobs.files import JobFiles
from server.services.job_queue import JobQueue, Lease

T = TypeVar("T")

# The latest one to go on from, and one before it in case that the disk loses the latest.
KEPT_CHECKPOINTS = 2
ALL_CHECKPOINTS = 2**31 - 1
_RETRY_SECONDS = 1.0
# One sign of progress in the log for each such time: reading a hundred thousand records gives many more.
_PREPARING_SECONDS = 2.0
_NOTHING = IndexCounters()


async def persist(call: Callable[[], Awaitable[T]]) -> T:
    """Write to the database, again and again while it is away. Whoever holds the lease sets an end to this when it runs out."""
    while True:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(_RETRY_SECONDS)


class Relay:
    """The way of one child's events into the log of its job."""

    def __init__(
        self,
        queue: JobQueue,
        lease: Lease,
        files: JobFiles,
        document_count: int = 0,
        counters: IndexCounters = _NOTHING,
        kept_checkpoints: int = KEPT_CHECKPOINTS,
    ) -> None:
        """`document_count` and `counters` are those of an index job: of all its attempts, and what the earlier ones committed."""
        self._kept_checkpoints = kept_checkpoints
        self._queue = queue
        self._lease = lease
        self._files = files
        self._document_count = document_count
        self._base = self._counters = counters
        self._committed = 0
        self._pending: list[LoggedPayload] = []
        self._space: MeasuredSpace | None = None
        self._last_evaluation: Evaluated | None = None
        self._is_finalizing = False
        self._next_preparing = 0.0
        self.has_started = False  # it trains, or embeds: there may be something to save

    async def run(self, events: AsyncIterator[Sequence[ChildEvent]]) -> ResultReady | Failed | Paused | None:
        """Relay until the child says how it ended; None when it ended without a word. Raises LeaseLost."""
        async for batch in events:
            for event in batch:
                if isinstance(event, ResultReady | Failed | Paused):
                    await self._flush()
                    await self._begin_finalizing(event)
                    return event
                await self._take(event)
            # What came together is written together: while one write runs, the next batch gathers in the pipe.
            await self._flush()
        return None

    async def _take(self, event: ChildEvent) -> None:
        match event:
            case Started():
                self.has_started = True
                await self._change_state(JobState.RUNNING, "The model and the data are ready.")
                self._pending.append(event)
            case Evaluated():
                self._last_evaluation = event
                self._pending.append(event)
            case StepDone() | Warned() | DataChecked() | Sampled() | BatchAdvanced():
                self._pending.append(event)
            case Preparing():
                if time.monotonic() >= self._next_preparing:
                    self._next_preparing = time.monotonic() + _PREPARING_SECONDS
                    self._pending.append(event)
            case IndexAdvanced():
                self._counters = replace(
                    self._base.add(event.counters), committed_documents=self._base.committed_documents + self._committed
                )
                if time.monotonic() >= self._next_preparing:
                    self._next_preparing = time.monotonic() + _PREPARING_SECONDS
                    self._pending.append(IndexAdvanced(self._counters))
            case CheckpointSaved():
                await self._record_checkpoint(event)
            case SpaceFound():
                self._space = event.measured
            case DocumentIndexed():
                await self._commit_document(event)
            case Finalizing():
                await self._begin_finalizing(event)
            case _:
                raise ValueError(f"unexpected {type(event).__name__}")

    async def _flush(self) -> None:
        if self._pending:
            payloads, self._pending = self._pending, []
            await persist(lambda: self._queue.append(self._lease, payloads))

    async def _begin_finalizing(self, event: ChildEvent) -> None:
        if not self._is_finalizing and not isinstance(event, Failed | Paused):
            self._is_finalizing = True
            await self._change_state(JobState.FINALIZING, "The result is being written and tried.")

    async def _change_state(self, state: JobState, reason: str) -> None:
        await self._flush()
        await persist(lambda: self._queue.change_state(self._lease, state, reason))

    async def _record_checkpoint(self, event: CheckpointSaved) -> None:
        await self._flush()
        evaluated = self._last_evaluation
        eval_loss = evaluated.loss if evaluated and evaluated.step == event.step else None
        checkpoint = Checkpoint(event.step, event.path, event.size_bytes, datetime.now(UTC), eval_loss, event.best)
        dropped = await persist(lambda: self._queue.record_checkpoint(self._lease, checkpoint, self._kept_checkpoints))
        for old in dropped:
            await asyncio.to_thread(self._files.delete, old.path)

    async def _commit_document(self, event: DocumentIndexed) -> None:
        await self._flush()
        if self._space is None:
            raise ValueError("a document came before the space of its vectors")
        vectors = base64.b64decode(event.vectors, validate=True)
        reading = replace(event.reading, counters=self._counters)
        dropped = await persist(
            lambda: self._queue.commit_document(
                self._lease,
                event.document_id,
                event.chunks,
                vectors,
                event.dimension,
                event.error,
                self._document_count,
                reading,
                self._space,
            )
        )
        self._committed += 1
        for path in dropped:
            await asyncio.to_thread(self._files.delete, path)
