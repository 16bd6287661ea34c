"""A batch generation from order to result, in a process of its own. Knows records, files and the engine's port; no database.

One bad record fails alone, with its reason in the result; what ends the job is raised as JobFailure.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from server.batches.patience import PatientEngine
from server.batches.prompts import make_request
from server.batches.results import Answered, BatchResults, write_answer, write_failure
from server.childprocess import Signals, measure_peak_memory
from server.datafiles.reading import FileForm, NumberedRecord, read_records
from server.datafiles.unpacking import FileInvalid, recognise_compression
from server.diskfiles import hash_file
from server.domain.errors import ErrorData, NotFound, ServiceError
from server.domain.events import ChildEvent, Finalizing, Paused, ResultReady, Started
from server.domain.jobs import FailureReason, JobFailure
from server.domain.orders import BatchOrder
from server.domain.records import RecordInvalid
from server.services.model_ports import Engine
from server.storage.artefacts import ArtefactInvalid, ArtefactStore

SIGNAL_SECONDS = 0.1
# Records read ahead of the first one that is not answered, per concurrent one: long answers do not make the others wait.
READ_AHEAD = 4


@dataclass(frozen=True, slots=True)
class BatchParts:
    """What a batch works with. `fetch` gives the place of a stored file on this disk; `concurrency` counts answers at once."""

    store: ArtefactStore
    fetch: Callable[[str], Awaitable[Path]]
    engine: Engine
    concurrency: int


async def run_batch(order: BatchOrder, parts: BatchParts, emit: Callable[[ChildEvent], None], signals: Signals) -> None:
    """Do the job of the order; returns early once a signal says so. Raises JobFailure for what cannot work.

    Told to stop it saves nothing; told to pause it saves what it has and says Paused.
    """
    try:
        batch = await _open(order, parts, emit)
        work = asyncio.create_task(batch.run())
        while not work.done():
            await asyncio.wait({work}, timeout=SIGNAL_SECONDS)
            if signals.should_stop() or signals.should_pause():
                work.cancel()
                await asyncio.wait({work})
        if not work.cancelled():
            work.result()
        elif not signals.should_stop():
            batch.results.save()
            emit(Paused())
    except ArtefactInvalid as error:
        raise JobFailure(FailureReason.ARTIFACT_INVALID, str(error), "Start the job again; look at the disk if this repeats.") from error


async def _open(order: BatchOrder, parts: BatchParts, emit: Callable[[ChildEvent], None]) -> "_Batch":
    """Find the records, and what there is of their answers already."""
    dataset = order.dataset
    total = dataset.record_count + dataset.invalid_record_count
    try:
        path = await parts.fetch(dataset.path)
        if await asyncio.to_thread(hash_file, path) != dataset.sha256:
            raise JobFailure(FailureReason.DATASET_INVALID, "The dataset's file is not the one that was uploaded.", "Upload it again.")
    except (NotFound, OSError) as error:
        raise JobFailure(FailureReason.DATASET_INVALID, "The dataset's file is missing.", "Upload it again.") from error
    results = BatchResults(order, parts.store, emit, total)
    form = FileForm(dataset.format, recognise_compression(path))
    records = islice(read_records(path, form, dataset.record_kind), results.counters.records, None)
    # A record's answers are generated side by side, each in a place of its own.
    concurrency = max(1, parts.concurrency // order.spec.parameters.n)
    return _Batch(order, concurrency, PatientEngine(parts.engine), records, results, emit, total)


@dataclass(frozen=True, slots=True)
class _Batch:
    order: BatchOrder
    concurrency: int
    engine: PatientEngine
    records: Iterator[NumberedRecord]
    results: BatchResults
    emit: Callable[[ChildEvent], None]
    total: int

    async def run(self) -> None:
        """Answer what is left, and write the result."""
        began = time.monotonic()
        await self._load()
        self.emit(Started(total_steps=self.total, resumed_from_step=self.results.counters.records))
        async with aclosing(self._answer()) as answers:
            async for answered in answers:
                self.results.add(answered)
        self.results.save()
        self._demand_answers()
        self.emit(Finalizing())
        artefact, counters = self.results.finish(), self.results.counters
        self.emit(
            ResultReady(
                artifact_path=artefact.path,
                manifest_sha256=artefact.manifest_sha256,
                size_bytes=artefact.size_bytes,
                metrics={"records": float(counters.records), "failed_records": float(counters.failed_records)},
                compute_seconds=time.monotonic() - began,
                peak_memory_bytes=measure_peak_memory(),
            )
        )

    async def _load(self) -> None:
        """What is wrong with the model itself shows here, once, and not with every record."""
        try:
            await self.engine.load(self.order.model)
        except ServiceError as error:
            raise JobFailure(FailureReason.BASE_MODEL_UNAVAILABLE, str(error), "Choose another model, or one that fits.") from error

    async def _answer(self) -> AsyncGenerator[Answered]:
        """Give the answers in the order of the records, several of which are at work together."""
        places = asyncio.Semaphore(self.concurrency)
        waiting: deque[asyncio.Task[Answered]] = deque()
        try:
            while True:
                while len(waiting) < self.concurrency * READ_AHEAD and (numbered := self._read_next()):
                    waiting.append(asyncio.create_task(self._answer_one(numbered, places)))
                if not waiting:
                    return
                yield await waiting[0]
                waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _answer_one(self, numbered: NumberedRecord, places: asyncio.Semaphore) -> Answered:
        number, line = numbered.number, numbered.line
        try:
            request = make_request(self.order, numbered)
            async with places:
                return write_answer(number, line, await self.engine.answer(request))
        except RecordInvalid as error:
            return write_failure(number, line, ErrorData("INVALID_ARGUMENT", error.code, str(error)))
        except ServiceError as error:
            return write_failure(number, line, error.data)

    def _read_next(self) -> NumberedRecord | None:
        try:
            return next(self.records, None)
        except FileInvalid as error:
            raise JobFailure(FailureReason.DATASET_INVALID, str(error), "Correct the file and upload it again.") from error

    def _demand_answers(self) -> None:
        counters, error = self.results.counters, self.results.first_error
        if counters.answered_records == 0:
            why = f" The first: {error.message}" if error else ""
            raise JobFailure(
                FailureReason.DATASET_INVALID,
                f"None of the {counters.records:,} records could be answered.{why}",
                "Correct the records, or change the parameters or the model.",
            )
