"""One claimed job from claim to settlement: starts its work, keeps the lease alive, and writes how it ended, for one owner only."""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from server.childprocess import explain_failure
from server.domain.errors import ErrorData, FailedPrecondition, InvalidInput, LeaseLost, Unavailable
from server.domain.events import Failed, ResultReady
from server.domain.jobs import TERMINAL_STATES, FailureReason, JobState
from server.domain.orders import IndexOrder
from server.domain.specs import IndexSpec
from server.jobs.execution import Execution, RunningWork
from server.jobs.files import JobFiles
from server.jobs.relay import Relay, persist
from server.services.ports import Claim, JobQueue

_logger = logging.getLogger(__name__)

# From SIGTERM to SIGKILL. The child saves nothing when it is stopped, so there is nothing to wait long for.
_STOP_GRACE_SECONDS = 2.0
# A child that has delivered its result has only its memory to give back.
_EXIT_GRACE_SECONDS = 10.0
_STOPPING_STATES = frozenset({JobState.CANCELLING, JobState.PAUSING})
_SHUT_DOWN = "The worker was shut down; the job goes on from its last checkpoint."


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


_Ending = ResultReady | Failed | _Interrupted | JobState


class JobRunner:
    """Runs claimed jobs, any number at once."""

    def __init__(self, queue: JobQueue, execution: Execution, files: JobFiles, terms: LeaseTerms) -> None:
        self._queue = queue
        self._execution = execution
        self._files = files
        self._terms = terms

    async def run(self, claim: Claim, shutdown: asyncio.Event) -> None:
        """Run the job to its end, its cancellation, the loss of its lease or the shutdown of this worker, and settle it."""
        held = _HeldJob(claim)
        pulse = asyncio.create_task(self._keep_lease(held))
        care = asyncio.create_task(self._care_for(held, shutdown))
        try:
            # The pulse ends only with the lease, and with the lease ends the right to write.
            await asyncio.wait({pulse, care}, return_when=asyncio.FIRST_COMPLETED)
            await (care if care.done() else pulse)
        except LeaseLost as error:
            _logger.warning("job %s, epoch %d: the lease is lost, nothing more is written: %s", claim.job.job_id, claim.lease.epoch, error)
        finally:
            await _cancel(care, pulse)

    async def _care_for(self, held: "_HeldJob", shutdown: asyncio.Event) -> None:
        work = asyncio.create_task(self._work(held))
        stopping = asyncio.create_task(held.stopping.wait())
        closing = asyncio.create_task(shutdown.wait())
        try:
            await asyncio.wait({work, stopping, closing}, return_when=asyncio.FIRST_COMPLETED)
            if closing.done() and not (work.done() or stopping.done()):
                await self._close(held, work)
            await _cancel(stopping, closing, *([] if work.done() else [work]))
            await self._settle(held, _Interrupted(_SHUT_DOWN, is_crash=False) if work.cancelled() else work.result())
        finally:
            await _cancel(work, stopping, closing)

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
        order = await self._files.write_order(claim, self._queue.read_pending_documents(claim.lease))
        child = held.child = await self._execution.start(order, self._files.log_path(claim))
        # Of the whole job: what earlier attempts have committed is not in this order.
        document_count = claim.job.progress.step + order.document_count if isinstance(order, IndexOrder) else 0
        try:
            ending = await Relay(self._queue, claim.lease, self._files, document_count).run(child.read_events())
            if ending is None:
                return self._explain_silence(held, child, await child.wait())
            with suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), _EXIT_GRACE_SECONDS)
            return ending
        finally:
            await child.stop(_STOP_GRACE_SECONDS)
            child.close()

    def _explain_silence(self, held: "_HeldJob", child: RunningWork, end: str) -> _Interrupted:
        if held.is_closing:
            return _Interrupted(_SHUT_DOWN, is_crash=False)
        job = held.claim.job
        _logger.warning(
            "job %s, attempt %d: the child ended (%s); its last lines:\n%s", job.job_id, job.attempt, end, child.read_log_tail()
        )
        return _Interrupted(f"The training process ended without a result ({end}).")

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
            if state in _STOPPING_STATES:
                held.stopping.set()

    async def _settle(self, held: "_HeldJob", ending: _Ending) -> None:
        """Write the end of the job, once it is certain that nothing of it runs any more, then remove what it leaves."""
        claim = held.claim
        if not isinstance(ending, ResultReady):
            # Why it was stopped stands in the database, and a cancel may have come just now: it wins over everything but a result.
            state = await persist(lambda: self._queue.heartbeat(claim.lease, self._terms.lease_seconds))
            ending = state if state in _STOPPING_STATES else ending
        state = await self._write_end(claim, ending)
        _logger.info("job %s, attempt %d: %s", claim.job.job_id, claim.job.attempt, state)
        await asyncio.to_thread(self._clear_up, claim, ending, state)

    async def _write_end(self, claim: Claim, ending: _Ending) -> JobState:
        queue, lease = self._queue, claim.lease
        match ending:
            case ResultReady():
                if await persist(lambda: queue.complete(lease, ending)):
                    return JobState.SUCCEEDED
                return await self._write_end(claim, JobState.CANCELLING)
            case Failed():
                error = ErrorData("FAILED_PRECONDITION", ending.reason, ending.message, {"suggestion": ending.suggestion})
                await persist(lambda: queue.fail(lease, ending.reason, error))
                return JobState.FAILED
            case _Interrupted():
                # A shutdown is nobody's fault: it may be repeated without end, crashes may not.
                max_attempts = self._terms.max_attempts if ending.is_crash else None
                return await persist(lambda: queue.interrupt(lease, ending.reason, max_attempts))
            case JobState.PAUSING:
                await persist(lambda: queue.change_state(lease, JobState.PAUSED, "Paused; goes on from its last checkpoint."))
                return JobState.PAUSED
            case _:
                await persist(lambda: queue.cancel(lease))
                return JobState.CANCELLED

    def _clear_up(self, claim: Claim, ending: _Ending, state: JobState) -> None:
        result = ending.artifact_path if isinstance(ending, ResultReady) and state is JobState.SUCCEEDED else None
        self._files.delete_results(claim, keep=result)
        if state in TERMINAL_STATES:
            self._files.delete_job(claim, keep_logs=state is JobState.FAILED)


class _HeldJob:
    """A claimed job while it runs here."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.child: RunningWork | None = None
        self.stopping = asyncio.Event()  # the api wants it cancelled or paused
        self.is_closing = False  # this worker shuts down


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
