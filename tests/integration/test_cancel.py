"""Cancelling real jobs in each state that is not terminal, and the limit of running ones."""

import time

import httpx
import psutil
import pytest

from tests.e2e.stack import MAX_TRAINING_JOBS, Stack, is_alive
from tests.integration.jobs import TrainingJobs

# Several starts of a child, each of which imports torch; much slower beside other work.
pytestmark = pytest.mark.timeout(900)

ENDLESS = 100_000


@pytest.mark.parametrize("state", ["STATE_STARTING", "STATE_RUNNING"])
def test_a_held_job_is_cancelled_and_no_process_is_left(stack: Stack, jobs: TrainingJobs, state: str) -> None:
    job_id = jobs.create_job(ENDLESS)
    jobs.wait_for_state(job_id, state)
    child = stack.wait_for_role("train")
    assert jobs.cancel(job_id)["state"] == "STATE_CANCELLING"
    assert jobs.cancel(job_id)["state"] in ("STATE_CANCELLING", "STATE_CANCELLED")
    job = jobs.wait_for_end(job_id)
    assert job["state"] == "STATE_CANCELLED"
    assert not is_alive(child)
    assert stack.find_role("train") is None
    assert not list(stack.storage_path.glob(f"**/{job_id}*"))


def test_a_cancel_takes_effect_within_seconds(stack: Stack, jobs: TrainingJobs) -> None:
    job_id = jobs.create_job(ENDLESS)
    jobs.wait_for_step(job_id, 5)
    began = time.monotonic()
    jobs.cancel(job_id)
    jobs.wait_for_end(job_id)
    assert time.monotonic() - began < 4
    ((steps_after,),) = stack.query(
        "SELECT count(*) FROM job_events WHERE job_id = %s AND kind = 'step' AND sequence >"
        " (SELECT sequence FROM job_events WHERE job_id = %s AND payload->>'state' = 'CANCELLED')",
        job_id, job_id,
    )  # fmt: skip
    assert steps_after == 0


def test_a_queued_job_is_cancelled_at_once(jobs: TrainingJobs) -> None:
    running = [jobs.create_job(ENDLESS) for _ in range(MAX_TRAINING_JOBS)]
    queued = jobs.create_job(ENDLESS)
    for job_id in running:
        jobs.wait_for_state(job_id, "STATE_RUNNING")
    assert jobs.read(queued)["state"] == "STATE_QUEUED"
    assert jobs.cancel(queued)["state"] == "STATE_CANCELLED"


def test_a_job_whose_worker_is_dead_is_cancelled_too(stack: Stack, jobs: TrainingJobs) -> None:
    job_id = jobs.create_job(ENDLESS)
    jobs.wait_for_step(job_id, 3)
    stack.wait_for_role("worker").kill()
    jobs.cancel(job_id)
    assert jobs.wait_for_end(job_id)["state"] == "STATE_CANCELLED"


def test_a_finished_job_cannot_be_cancelled(stack: Stack, jobs: TrainingJobs) -> None:
    job_id = jobs.create_job(5)
    jobs.wait_for_end(job_id)
    response = httpx.post(f"{stack.api}/training-jobs/{job_id}/cancel", json={}, timeout=30)
    assert response.status_code == 400
    assert jobs.read(job_id)["state"] == "STATE_SUCCEEDED"


def test_max_training_jobs_is_held_while_more_are_waiting(stack: Stack, jobs: TrainingJobs) -> None:
    waiting = [jobs.create_job(20) for _ in range(MAX_TRAINING_JOBS + 2)]
    most_held, most_children, left = 0, 0, len(waiting)
    while left:
        # One statement, one moment: states read one after the other would count a job's predecessor too.
        ((held, left),) = stack.query(
            "SELECT count(*) FILTER (WHERE state IN ('STARTING', 'RUNNING', 'FINALIZING')), count(*) FILTER (WHERE state <> 'SUCCEEDED')"
            " FROM jobs WHERE job_id = ANY(%s)",
            waiting,
        )
        most_held = max(most_held, held)
        most_children = max(most_children, sum("train" in _read_command(process) for process in stack.list_processes()))
        assert not stack.query("SELECT job_id FROM jobs WHERE state = 'FAILED' AND job_id = ANY(%s)", waiting)
        time.sleep(0.1)
    assert most_held == MAX_TRAINING_JOBS
    assert most_children == MAX_TRAINING_JOBS


def _read_command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
