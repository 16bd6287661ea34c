"""A job under its row's lock: gathers state changes and events, and writes the row and the log in one go.

Whoever writes to a job goes through here. The row's lock orders the writers, and sequence numbers come from the row: the log has no gap.
"""

import json
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.tables import checkpoints, job_events, jobs
from server.domain.errors import ErrorData, FailedPrecondition, LeaseLost
from server.domain.events import CheckpointSaved, Evaluated, LoggedPayload, StateChanged, StepDone
from server.domain.jobs import HELD_STATES, TERMINAL_STATES, JobState, may_follow
from server.services.codec import LOGGED_PAYLOAD, Codec

# These go on from nothing any more. A FAILED job keeps its checkpoints: a retry may go on from them.
_WITHOUT_CHECKPOINTS = (JobState.SUCCEEDED, JobState.CANCELLED)
# One channel for all state changes: NOTIFY takes a database-wide lock at commit, so training steps send none.
JOBS_CHANNEL = "model_training_jobs"

_ERROR = Codec[ErrorData](ErrorData)


class LockedJob:
    """One row of jobs, locked by the open transaction."""

    def __init__(self, connection: AsyncConnection, row: Row[Any]) -> None:
        self.row = row
        self.state = JobState(row.state)
        self._connection = connection
        self._payloads: list[LoggedPayload] = []
        self._values: dict[str, Any] = {}

    @property
    def is_changed(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._payloads or self._values)

    def log(self, payload: LoggedPayload) -> None:
        """Add an event to what `write` will log."""
        self._payloads.append(payload)

    def set(self, **values: Any) -> None:
        """Give columns of the row new values."""
        self._values |= values

    def move(self, state: JobState, reason: str = "", error: ErrorData | None = None) -> None:
        """Move to another state and log it. Raises FailedPrecondition where the table of transitions forbids it."""
        if not may_follow(self.state, state):
            raise FailedPrecondition(
                f"The job is {self.state.value}; it cannot become {state.value}.",
                reason="JOB_STATE_FORBIDS",
                metadata={"job_id": self.row.job_id, "state": self.state.value},
            )
        self.log(StateChanged(state, reason, error, self.state))
        self.set(state=state, state_reason=reason, error=_ERROR.to_json(error) if error else None)
        if state in TERMINAL_STATES:
            self.set(end_time=func.clock_timestamp())
        if self.state in HELD_STATES and state not in HELD_STATES:
            self._release()
        self.state = state

    def requeue(self) -> None:
        """Move back to QUEUED as the next attempt."""
        attempt = self.row.attempt + 1
        self.move(JobState.QUEUED, f"attempt {attempt}")
        self.set(attempt=attempt)

    def _release(self) -> None:
        held = func.extract("epoch", func.clock_timestamp() - jobs.c.lease_start_time)
        self.set(held_seconds=jobs.c.held_seconds + held, worker_id=None, lease_start_time=None, lease_end_time=None)

    async def write(self) -> None:
        """Write the row and the events, and tell the watchers of a changed state. Raises LeaseLost."""
        row, sequence = self.row, self.row.last_sequence + len(self._payloads)
        own = (jobs.c.organization == row.organization, jobs.c.job_id == row.job_id, jobs.c.lease_epoch == row.lease_epoch)
        values = {"update_time": func.clock_timestamp(), "last_sequence": sequence} | self._values
        if (await self._connection.execute(update(jobs).where(*own).values(values))).rowcount != 1:
            raise lease_lost(row.job_id)
        if self._payloads:
            await self._connection.execute(insert(job_events).values(time=func.clock_timestamp()), self._event_rows())
        if self.state in _WITHOUT_CHECKPOINTS:
            of_job = (checkpoints.c.organization == row.organization, checkpoints.c.job_id == row.job_id)
            await self._connection.execute(delete(checkpoints).where(*of_job))
        if any(isinstance(payload, StateChanged) for payload in self._payloads):
            notice = json.dumps([row.organization, row.job_id, sequence])
            await self._connection.execute(select(func.pg_notify(JOBS_CHANNEL, notice)))

    def _event_rows(self) -> list[dict[str, Any]]:
        row = self.row
        attempt = self._values.get("attempt", row.attempt)
        return [
            {
                "organization": row.organization,
                "job_id": row.job_id,
                "sequence": sequence,
                "attempt": attempt if _is_queued_again(payload) else row.attempt,
                "kind": payload.kind,
                "step": payload.step if isinstance(payload, StepDone | Evaluated | CheckpointSaved) else None,
                "payload": LOGGED_PAYLOAD.to_json(payload),
            }
            for sequence, payload in enumerate(self._payloads, row.last_sequence + 1)
        ]


def _is_queued_again(payload: LoggedPayload) -> bool:
    """Tell the event that a new attempt begins with: INTERRUPTED still belongs to the old one."""
    return isinstance(payload, StateChanged) and payload.state is JobState.QUEUED


def lease_lost(job_id: str) -> LeaseLost:
    """Make the error of a worker that does not hold the job any more."""
    return LeaseLost("Another worker owns the job now, or it is over.", metadata={"job_id": job_id})
