"""The attempts at a job, read out of the state changes in its event log and in those of the jobs that it tries again."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, case, func, select, true, type_coerce
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.tables import IS_STATE_EVENT, job_events, jobs
from server.domain.events import StateChanged
from server.domain.jobs import TERMINAL_STATES, Attempt, JobState
from server.services.codec import Codec

_CHANGE = Codec[StateChanged](StateChanged)
_ENDS = TERMINAL_STATES | {JobState.INTERRUPTED, JobState.PAUSED}


async def read_attempts(
    connection: AsyncConnection, organization: str, job_id: str, before_attempt: int | None, limit: int
) -> Sequence[Attempt]:
    """List attempts, latest first, below an attempt's number. Numbers go on along a chain of retries, so they tell all attempts apart."""
    found = _select_attempts(organization, job_id, before_attempt, limit).subquery("found")
    # Of an attempt that goes on, the latest state change is not the latest event.
    end = case((found.c.change["state"].astext.in_(_ENDS), found.c.change_sequence), else_=found.c.job_last_sequence)
    # Backwards from an attempt's end: its last step is a few events away, however long the log is.
    of_job = (job_events.c.organization == organization, job_events.c.job_id == found.c.job_id)
    steps = select(job_events.c.step).where(
        *of_job, job_events.c.sequence.between(found.c.first_sequence, end), job_events.c.kind == "step"
    )
    last_step = steps.order_by(job_events.c.sequence.desc()).limit(1).lateral("last_step")
    query = select(found, last_step.c.step).select_from(found.outerjoin(last_step, true())).order_by(found.c.attempt.desc())
    return [_attempt_from_row(row) for row in await connection.execute(query)]


def _select_attempts(organization: str, job_id: str, before_attempt: int | None, limit: int) -> Select[Any]:
    own = select(jobs.c.job_id, jobs.c.retry_of_job_id, jobs.c.last_sequence)
    chain = own.where(jobs.c.organization == organization, jobs.c.job_id == job_id).cte("chain", recursive=True)
    chain = chain.union_all(own.where(jobs.c.organization == organization, jobs.c.job_id == chain.c.retry_of_job_id))
    of_chain = [job_events.c.organization == organization, job_events.c.job_id == chain.c.job_id, IS_STATE_EVENT]
    of_chain += [job_events.c.attempt < before_attempt] if before_attempt is not None else []
    changes = select(
        job_events.c.job_id,
        job_events.c.attempt,
        func.min(job_events.c.sequence).label("first_sequence"),
        func.max(job_events.c.sequence).label("change_sequence"),
        _latest(job_events.c.time).label("change_time"),
        _latest(job_events.c.payload).label("change"),
        func.min(job_events.c.time).filter(job_events.c.payload["state"].astext == JobState.STARTING).label("start_time"),
        chain.c.last_sequence.label("job_last_sequence"),
    )
    by_attempt = changes.where(*of_chain).group_by(job_events.c.job_id, job_events.c.attempt, chain.c.last_sequence)
    return by_attempt.order_by(job_events.c.attempt.desc()).limit(limit)


def _latest(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Give the column's value in the latest event of each group."""
    values: ColumnElement[Any] = func.array_agg(aggregate_order_by(column, job_events.c.sequence.desc()), type_=ARRAY(column.type))
    return type_coerce(values[1], column.type)


def _attempt_from_row(row: Row[Any]) -> Attempt:
    change = _CHANGE.from_json(row.change)
    return Attempt(
        job_id=row.job_id,
        attempt=row.attempt,
        state=change.state,
        reason=change.reason,
        error=change.error,
        last_step=row.step,
        start_time=row.start_time,
        end_time=row.change_time if change.state in _ENDS else None,
    )
