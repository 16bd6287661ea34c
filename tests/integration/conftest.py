"""What the fault tests share."""

from collections.abc import Iterator

import pytest

from tests.e2e.stack import Stack
from tests.integration.jobs import TERMINAL, TrainingJobs
from tests.integration.serving import place, serving

__all__ = ["place", "serving"]


@pytest.fixture
def jobs(stack: Stack) -> Iterator[TrainingJobs]:
    """Jobs of the shared stack; what a test left running is cancelled."""
    stack.wait_ready()
    jobs = TrainingJobs(stack)
    yield jobs
    stack.wait_ready()
    for (job_id,) in stack.query("SELECT job_id FROM jobs WHERE state NOT IN ('SUCCEEDED', 'FAILED', 'CANCELLED')"):
        jobs.cancel(job_id)
        jobs.wait_for_state(job_id, *TERMINAL)
