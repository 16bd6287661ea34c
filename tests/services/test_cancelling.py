"""Cancel, in every state that a job can be in."""

import psycopg
import pytest

from server.db.database import PostgresDatabase
from server.domain.errors import FailedPrecondition
from server.domain.jobs import HELD_STATES, TERMINAL_STATES, JobState
from tests.db.samples import add_job
from tests.services.conftest import ORGANIZATION, UseCases


async def put_job(database: PostgresDatabase, database_url: str, state: JobState) -> str:
    """Store a job and put it into a state, as a worker would have."""
    job = await add_job(database)
    lease = ", lease_end_time = now() + interval '1 minute', lease_start_time = now(), worker_id = 'w'" if state in HELD_STATES else ""
    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"UPDATE jobs SET state = %s{lease} WHERE job_id = %s".encode(), (state.value, job.job_id))  # noqa: S608  # own text
    return job.job_id


@pytest.mark.parametrize("state", sorted(set(JobState) - TERMINAL_STATES))
async def test_a_job_is_cancelled_in_every_state_that_is_not_terminal_and_twice_is_harmless(
    use_cases: UseCases, database: PostgresDatabase, database_url: str, state: JobState
) -> None:
    job_id = await put_job(database, database_url, state)
    reached = [(await use_cases.training.control.cancel(ORGANIZATION, job_id)).state for _ in range(2)]
    assert reached == [JobState.CANCELLING if state in HELD_STATES else JobState.CANCELLED] * 2


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
async def test_cancelling_a_finished_job_is_refused(
    use_cases: UseCases, database: PostgresDatabase, database_url: str, state: JobState
) -> None:
    job_id = await put_job(database, database_url, state)
    with pytest.raises(FailedPrecondition, match=state.value):
        await use_cases.training.control.cancel(ORGANIZATION, job_id)
