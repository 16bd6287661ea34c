"""What a job's events say about its progress, its best evaluation and its usage, and which of them the log has already."""

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.jobs import BEST, PROGRESS
from server.db.locked_job import LockedJob
from server.db.tables import job_events
from server.domain.events import (
    BatchAdvanced,
    CheckpointSaved,
    Evaluated,
    IndexAdvanced,
    IndexProgress,
    LoggedPayload,
    Sampled,
    Started,
    StateChanged,
    StepDone,
)
from server.domain.jobs import Best, IndexCounters, Progress
from server.services.codec import Codec

_SAMPLE = Codec[Sampled](Sampled)


async def record_payloads(connection: AsyncConnection, job: LockedJob, payloads: Sequence[LoggedPayload]) -> None:
    """Log what is new of `payloads` and bring the row's numbers up to date; the caller writes.

    A child that goes on from a checkpoint repeats steps, evaluations, samples and checkpoints, equal bit for bit: the log keeps the
    first ones.
    """
    logged = await _find_logged(connection, job, payloads)
    samples = await _find_samples(connection, job, payloads)
    row = job.row
    progress, best = PROGRESS.from_json(row.progress), BEST.from_json(row.best)
    last_step, tokens, memory_bytes = row.last_step, row.tokens, row.peak_memory_bytes
    for payload in payloads:
        if isinstance(payload, StateChanged):
            raise ValueError("a state is changed by moving the job, not by logging that it changed")
        if isinstance(payload, Evaluated | CheckpointSaved):
            if (payload.kind, payload.step) in logged:
                continue
            logged.add((payload.kind, payload.step))
        if isinstance(payload, Sampled):
            # What belongs to an earlier step was logged before the next step was.
            if payload.step < job.row.last_step or payload in samples:
                continue
            samples.append(payload)
        if isinstance(payload, StepDone):
            if payload.step <= last_step:
                continue
            last_step, tokens = payload.step, max(tokens, payload.tokens)
            memory_bytes = max(memory_bytes, payload.memory_bytes)
        if isinstance(payload, BatchAdvanced):
            tokens = max(tokens, payload.counters.tokens)
        # The trainer says which is the best: the base model before step 1 is none that a version could be made of.
        if isinstance(payload, Evaluated) and payload.best:
            best = Best(payload.step, payload.loss)
        progress = _advance(progress, payload)
        job.log(payload)
    if job.is_changed:
        job.set(progress=PROGRESS.to_json(progress), best=BEST.to_json(best))
        job.set(last_step=last_step, tokens=tokens, peak_memory_bytes=memory_bytes)


async def _find_logged(connection: AsyncConnection, job: LockedJob, payloads: Sequence[LoggedPayload]) -> set[tuple[str, int]]:
    asked = [(payload.kind, payload.step) for payload in payloads if isinstance(payload, Evaluated | CheckpointSaved)]
    if not asked:
        return set()
    key = (job_events.c.kind, job_events.c.step)
    of_job = (job_events.c.organization == job.row.organization, job_events.c.job_id == job.row.job_id)
    found = await connection.execute(select(*key).where(*of_job, job_events.c.step.is_not(None), tuple_(*key).in_(asked)))
    return {(kind, step) for kind, step in found}


async def _find_samples(connection: AsyncConnection, job: LockedJob, payloads: Sequence[LoggedPayload]) -> list[Sampled]:
    """Give the samples that the log has after its last step: at the log's end, however long it is."""
    if not any(isinstance(payload, Sampled) for payload in payloads):
        return []
    of_job = (job_events.c.organization == job.row.organization, job_events.c.job_id == job.row.job_id)
    last_step = (job_events.c.kind == "step", job_events.c.step == job.row.last_step)
    after = func.coalesce(select(job_events.c.sequence).where(*of_job, *last_step).scalar_subquery(), 0)
    query = select(job_events.c.payload).where(*of_job, job_events.c.sequence > after, job_events.c.kind == "sample")
    return [_SAMPLE.from_json(payload) for payload in await connection.scalars(query)]


def _advance(progress: Progress, payload: LoggedPayload) -> Progress:
    match payload:
        case Started():
            step = max(progress.step, payload.resumed_from_step)
            return replace(progress, step=step, total_steps=max(payload.total_steps, step))
        case StepDone():
            return Progress(
                step=payload.step,
                total_steps=payload.total_steps,
                epoch=payload.epoch,
                tokens=payload.tokens,
                tokens_per_second=payload.tokens_per_second,
                eta_seconds=payload.eta_seconds,
                loss=payload.loss,
            )
        case IndexProgress():
            return replace(progress, step=payload.documents_done, total_steps=payload.documents_total, indexing=payload.counters)
        case BatchAdvanced():
            return replace(
                progress,
                step=payload.counters.records,
                total_steps=payload.total_records,
                tokens=payload.counters.tokens,
                tokens_per_second=payload.tokens_per_second,
                eta_seconds=payload.eta_seconds,
                batch=payload.counters,
            )
        case IndexAdvanced():
            known = progress.indexing or IndexCounters()
            counters = replace(
                payload.counters,
                committed_documents=known.committed_documents,
                committed_chunks=known.committed_chunks,
                committed_reused=known.committed_reused,
            )
            return replace(progress, indexing=counters)
        case _:
            return progress
