"""The worker's loop: takes up jobs of dead workers, claims queued ones within the limits, runs them side by side, clears up orphans."""

import asyncio
import logging
import os
import secrets
import socket
import time

from server.domain.errors import Unavailable
from server.jobs.files import JobFiles
from server.jobs.runner import JobRunner, LeaseTerms
from server.services.job_queue import Claim, ClaimLimits, JobQueue, VectorTables

_logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
# Four times per lease: a dead worker's job waits at most a quarter of it longer.
_REAPS_PER_LEASE = 4
_SWEEP_SECONDS = 3600.0
_TEND_SECONDS = 5.0
# How long a job that FAILED keeps the checkpoints that a retry would go on from.
_RETRY_SECONDS = 7 * 24 * 3600.0


# How long the result of a batch generation can be downloaded. The README says so.
_RESULT_SECONDS = 30 * 24 * 3600.0


class Worker:
    """Claims and runs jobs until told to stop."""

    def __init__(
        self, queue: JobQueue, runner: JobRunner, files: JobFiles, limits: ClaimLimits, terms: LeaseTerms, vectors: VectorTables
    ) -> None:
        self._queue = queue
        self._runner = runner
        self._files = files
        self._limits = limits
        self._terms = terms
        self._vectors = vectors
        self._worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._next_reap = 0.0
        self._next_sweep = 0.0
        self._tending: asyncio.Task[None] | None = None
        self._next_tend = 0.0

    async def run(self, shutdown: asyncio.Event) -> None:
        """Work until `shutdown`, then wait until each running job is stopped and back in the queue."""
        closing = asyncio.create_task(self._wake_at(shutdown))
        try:
            while not shutdown.is_set():
                self._wake.clear()
                await self._take_turn(shutdown)
                try:
                    await asyncio.wait_for(self._wake.wait(), _POLL_SECONDS)
                except TimeoutError:
                    continue
        finally:
            closing.cancel()
            tending = [self._tending] if self._tending is not None else []
            for task in tending:
                task.cancel()  # what is half done, the next one does again
            await asyncio.gather(*self._running, *tending, return_exceptions=True)

    async def _wake_at(self, shutdown: asyncio.Event) -> None:
        await shutdown.wait()
        self._wake.set()

    async def _take_turn(self, shutdown: asyncio.Event) -> None:
        """Do what is due. A worker outlives every failure of a turn; the next one comes in a second."""
        try:
            await self._reap()
            await self._sweep()
            self._tend()
            while not shutdown.is_set() and (claim := await self._claim()) is not None:
                self._start(claim, shutdown)
        except Unavailable as error:
            _logger.warning("the database is away: %s", error)
        except Exception:
            _logger.exception("the worker's turn failed")

    async def _claim(self) -> Claim | None:
        return await self._queue.claim(self._worker_id, self._limits, self._terms.lease_seconds)

    def _start(self, claim: Claim, shutdown: asyncio.Event) -> None:
        job = claim.job
        _logger.info("job %s (%s), attempt %d, epoch %d: claimed", job.job_id, job.kind, job.attempt, claim.lease.epoch)
        task = asyncio.create_task(self._runner.run(claim, shutdown), name=job.job_id)
        self._running.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self._wake.set()  # there is room for the next job
        if not task.cancelled() and (error := task.exception()) is not None:
            # Nothing was settled: the lease runs out, and a reap puts the job back.
            _logger.error("job %s: its runner failed", task.get_name(), exc_info=error)

    async def _reap(self) -> None:
        if time.monotonic() < self._next_reap:
            return
        self._next_reap = time.monotonic() + self._terms.lease_seconds / _REAPS_PER_LEASE
        for job_id in await self._queue.reap(self._terms.max_attempts):
            _logger.warning("job %s: its worker is gone, taken up again", job_id)

    def _tend(self) -> None:
        """Remove indexes and see to the tables of large ones, beside everything else: it takes minutes, of the database's time."""
        if self._tending is not None and not self._tending.done():
            return
        if time.monotonic() >= self._next_tend:
            self._next_tend = time.monotonic() + _TEND_SECONDS
            self._tending = asyncio.create_task(self._tend_vectors(), name="vectors")

    async def _tend_vectors(self) -> None:
        try:
            for done in [*await self._queue.remove_idle_indexes(), *await self._vectors.tend()]:
                _logger.info("%s", done)
        except Exception as error:
            # Locks that others hold, a server that is away or full: nothing is lost, and the next turn tries again.
            _logger.warning("indexes and their tables were not seen to: %s", error)

    async def _sweep(self) -> None:
        if time.monotonic() < self._next_sweep:
            return
        self._next_sweep = time.monotonic() + _SWEEP_SECONDS
        await self._queue.drop_old_checkpoints(_RETRY_SECONDS)
        await self._queue.drop_old_results(_RESULT_SECONDS)
        live = await self._queue.list_live_directories()
        for path in await asyncio.to_thread(self._files.sweep, live):
            _logger.info("removed an orphan: %s", path)
