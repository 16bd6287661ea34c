"""One claimed job from claim to settlement: starts its work, keeps the lease alive, and writes how it ended, for one owner only."""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from server.childprocess import explain_failure
from server.domain.errors import ErrorData, FailedPrecondition, InvalidInput, LeaseLost, Unavailable
from server.domain.events import Failed, Paused, ResultReady
from server.domain.jobs import TERMINAL_STATES, FailureReason, IndexCounters, JobFailure, JobState
from server.domain.orders import BatchOrder, IndexOrder
from server.domain.specs import BatchSpec, ExportSpec, FineTuneSpec, IndexSpec
from server.jobs.execution import Execution, RunningWork, WorkEnd
from server.jobs.files import JobFiles
from server.jobs.relay import ALL_CHECKPOINTS, KEPT_CHECKPOINTS, Relay, persist
from server.services.job_queue import Claim, JobQueue

_logger = logging.getLogger(__name__)

# From SIGTERM to SIGKILL. The child saves nothing when it is stopped, so there is nothing to wait long for.
_STOP_GRACE_SECONDS = 2.0
# A child that has delivered its result has only its memory to give back.
_EXIT_GRACE_SECONDS = 10.0
# From the wish to pause to SIGTERM. A step of a large model takes a minute, its checkpoint of a hundred gigabytes a few more.
PAUSE_GRACE_SECONDS = 300.0
# The same maths on the same machine: if memory ran out twice in a row, it will a third time.
_MAX_MEMORY_KILLS = 2
_SHUT_DOWN = "The worker was shut down; the job goes on from its last checkpoint."
_STOPPED = "It was stopped; the job goes on from its last checkpoint."
_REINDEX = "Build the model's index anew (ReindexModel) and try the job again, or put the embedding model's files back."
_OUT_OF_MEMORY = "The training process was killed because memory ran out."


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How a job is held: the lease's length, how often it is renewed, and at which crash in a row it fails."""

    lease_seconds: float
    heartbeat_seconds: float
    max_attempts: int


@dataclass(frozen=True, slots=True)
class _Interrupted:
    """The work ended without a result, and another try may help."""

    reason: str
    is_crash: bool = True
    is_out_of_memory: bool = False


_Ending = ResultReady | Failed | _Interrupted


class JobRunner:
    """Runs claimed jobs, any number at once."""

    def __init__(
        self,
        queue: JobQueue,
        execution: Execution,
        files: JobFiles,
        terms: LeaseTerms,
        pause_grace_seconds: float = PAUSE_GRACE_SECONDS,
    ) -> None:
        self._queue = queue
        self._execution = execution
        self._files = files
        self._terms = terms
        self._pause_grace_seconds = pause_grace_seconds

    async def run(self, claim: Claim, shutdown: asyncio.Event) -> None:
        """Run the job to its end, its cancellation or pause, the loss of its lease or the shutdown of this worker, and settle it."""
        held = _HeldJob(claim)
        pulse = asyncio.create_task(self._keep_lease(held))
        care = asyncio.create_task(self._care_for(held, shutdown))
        try:
            # The pulse ends only with the lease, and with the lease ends the right to write.
            await asyncio.wait({pulse, care}, return_when=asyncio.FIRST_COMPLETED)
            if held.is_settling and not care.done():
                # The end is written, and a pulse finds no lease any more, before the writer has heard so; and files are still cleared up.
                await asyncio.wait({care}, timeout=self._terms.lease_seconds)
            await (care if care.done() else pulse)
        except LeaseLost as error:
            _logger.warning("job %s, epoch %d: the lease is lost, nothing more is written: %s", claim.job.job_id, claim.lease.epoch, error)
        finally:
            await _cancel(care, pulse)

    async def _care_for(self, held: "_HeldJob", shutdown: asyncio.Event) -> None:
        work = asyncio.create_task(self._work(held))
        stopping = asyncio.create_task(held.stopping.wait())
        pausing = asyncio.create_task(self._pause_when_asked(held))
        closing = asyncio.create_task(shutdown.wait())
        try:
            await asyncio.wait({work, stopping, closing}, return_when=asyncio.FIRST_COMPLETED)
            if closing.done() and not (work.done() or stopping.done()):
                await self._close(held, work)
            await _cancel(stopping, pausing, closing, *([] if work.done() else [work]))
            await self._settle(held, _Interrupted(_STOPPED, is_crash=False) if work.cancelled() else work.result())
        finally:
            await _cancel(work, stopping, pausing, closing)

    async def _pause_when_asked(self, held: "_HeldJob") -> None:
        """Have the child save its state and end; stop it where it does not, or has nothing to save yet."""
        await held.pausing.wait()
        if held.child is not None and held.relay is not None and held.relay.has_started:
            held.child.pause()
            await asyncio.sleep(self._pause_grace_seconds)
            if held.state is not JobState.PAUSING:
                return  # it was done before it heard of the pause, and writes its result
            _logger.warning("job %s: its child does not pause and is stopped", held.claim.job.job_id)
        held.stopping.set()

    async def _close(self, held: "_HeldJob", work: "asyncio.Task[_Ending]") -> None:
        """Stop for a shutdown. What the child said before it stopped is still written: a checkpoint among it saves work."""
        held.is_closing = True
        if held.child is None:
            work.cancel()
        else:
            await held.child.stop(_STOP_GRACE_SECONDS)
        await asyncio.wait({work})

    async def _work(self, held: "_HeldJob") -> _Ending:
        """Do the job; every failure but a lost lease becomes an ending."""
        try:
            return await self._execute(held)
        except (LeaseLost, asyncio.CancelledError):
            raise
        except (InvalidInput, FailedPrecondition) as error:
            # What the child made cannot be stored, and will not be the next time either.
            if error.reason == FailureReason.EMBEDDING_SPACE_CHANGED:
                return Failed(FailureReason.EMBEDDING_SPACE_CHANGED, str(error), _REINDEX)
            return Failed(
                FailureReason.DOCUMENTS_INVALID if isinstance(held.claim.job.spec, IndexSpec) else FailureReason.INTERNAL, str(error)
            )
        except Exception as error:
            failure = explain_failure(error)
            if failure is not None:
                return Failed(failure.reason, failure.message, failure.suggestion)
            _logger.exception("job %s, attempt %d, failed in its worker", held.claim.job.job_id, held.claim.job.attempt)
            return _Interrupted("The worker met an internal error.")

    async def _execute(self, held: "_HeldJob") -> _Ending:
        claim = held.claim
        _check_inputs(claim)
        order = await self._files.write_order(claim, self._queue.read_pending_documents(claim.lease))
        child = held.child = await self._execution.start(order, self._files.log_path(claim))
        # Of the whole job: what earlier attempts have committed is not in this order.
        document_count = claim.job.progress.step + order.document_count if isinstance(order, IndexOrder) else 0
        try:
            counters = (claim.job.progress.indexing or IndexCounters()).begin_attempt()
            # The parts of a batch are its result so far: all are needed.
            kept = ALL_CHECKPOINTS if isinstance(order, BatchOrder) else KEPT_CHECKPOINTS
            relay = held.relay = Relay(self._queue, claim.lease, self._files, document_count, counters, kept)
            ending = await relay.run(child.read_events())
            if ending is None:
                return self._explain_silence(held, child, await child.wait())
            with suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), _EXIT_GRACE_SECONDS)
            return _Interrupted(_STOPPED, is_crash=False) if isinstance(ending, Paused) else ending
        finally:
            await child.stop(_STOP_GRACE_SECONDS)
            child.close()

    def _explain_silence(self, held: "_HeldJob", child: RunningWork, end: WorkEnd) -> _Interrupted:
        if held.is_closing:
            return _Interrupted(_SHUT_DOWN, is_crash=False)
        job, said = held.claim.job, end.description
        _logger.warning(
            "job %s, attempt %d: the child ended (%s); its last lines:\n%s", job.job_id, job.attempt, said, child.read_log_tail()
        )
        if end.is_out_of_memory:
            return _Interrupted(_OUT_OF_MEMORY, is_out_of_memory=True)
        return _Interrupted(f"The training process ended without a result ({said}).")

    async def _keep_lease(self, held: "_HeldJob") -> None:
        """Renew the lease and notice when the api wants the job stopped. Ends with LeaseLost only, also when it could not renew."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(self._terms.heartbeat_seconds)
            began = time.monotonic()
            left = renewed + self._terms.lease_seconds - began
            if left <= 0:
                raise LeaseLost("the database could not be reached for as long as the lease lasts")
            try:
                state = await asyncio.wait_for(self._queue.heartbeat(held.claim.lease, self._terms.lease_seconds), left)
            except (Unavailable, TimeoutError):
                continue
            renewed = began
            held.state = state
            if state is JobState.CANCELLING:
                held.stopping.set()
            elif state is JobState.PAUSING:
                held.pausing.set()

    async def _settle(self, held: "_HeldJob", ending: _Ending) -> None:
        """Write the end of the job, once it is certain that nothing of it runs any more, then remove what it leaves."""
        claim, held.is_settling = held.claim, True
        state = await self._write_end(claim, ending)
        _logger.info("job %s, attempt %d: %s", claim.job.job_id, claim.job.attempt, state)
        await asyncio.to_thread(self._clear_up, claim, ending, state)

    async def _write_end(self, claim: Claim, ending: _Ending) -> JobState:
        """Settle the job; give the state reached. The database knows whether it was to be cancelled or paused, even just now."""
        queue, lease = self._queue, claim.lease
        match ending:
            case ResultReady():
                state = await persist(lambda: queue.complete(lease, ending))
                if state is not JobState.CANCELLING:
                    return state
                return await self._write_end(claim, _Interrupted(_STOPPED, is_crash=False))
            case Failed():
                error = ErrorData("FAILED_PRECONDITION", ending.reason, ending.message, {"suggestion": ending.suggestion})
                return await persist(lambda: queue.fail(lease, ending.reason, error))
            case _Interrupted(is_out_of_memory=True):
                most = min(_MAX_MEMORY_KILLS, self._terms.max_attempts)
                return await persist(lambda: queue.interrupt(lease, ending.reason, most, FailureReason.OUT_OF_MEMORY))
            case _Interrupted():
                # A shutdown is nobody's fault: it may be repeated without end, crashes may not.
                max_attempts = self._terms.max_attempts if ending.is_crash else None
                return await persist(lambda: queue.interrupt(lease, ending.reason, max_attempts))

    def _clear_up(self, claim: Claim, ending: _Ending, state: JobState) -> None:
        result = ending.artifact_path if isinstance(ending, ResultReady) and state is JobState.SUCCEEDED else None
        self._files.delete_results(claim, keep=result)
        if state in TERMINAL_STATES:
            self._files.delete_job(claim, for_retry=state is JobState.FAILED, keep=result)


class _HeldJob:
    """A claimed job while it runs here."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.child: RunningWork | None = None
        self.relay: Relay | None = None
        self.state = claim.job.state  # as the last heartbeat saw it
        self.stopping = asyncio.Event()  # it is to end now: cancelled, or it would not pause
        self.pausing = asyncio.Event()  # the api wants it paused
        self.is_closing = False  # this worker shuts down
        self.is_settling = False  # nothing of it runs any more, and its end is written; each write still demands the lease


def _check_inputs(claim: Claim) -> None:
    """Demand the version that a job works on: it may have been deleted since the job was created. Raises JobFailure."""
    spec = claim.job.spec
    match spec:
        case ExportSpec():
            needs_version = True
        case BatchSpec():
            needs_version = spec.version is not None
        case _:
            needs_version = isinstance(spec, FineTuneSpec) and spec.warm_start_from is not None
    if needs_version and claim.version is None:
        raise JobFailure(
            FailureReason.ARTIFACT_INVALID, "The version that the job works on does not exist any more.", "Name one that is there."
        )


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
