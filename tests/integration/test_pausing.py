"""Pausing and retrying a real training: its memory is freed, and what comes out is what an undisturbed one gives, bit for bit."""

import json
from pathlib import Path

import httpx
import pytest

from tests.e2e.stack import Stack, is_alive
from tests.integration.jobs import TrainingJobs

# Several starts of a child, each of which imports torch; much slower beside other work.
pytestmark = pytest.mark.timeout(900)

STEPS = 300


def _read_losses(stack: Stack, *job_ids: str) -> list[str]:
    rows = stack.query("SELECT payload->>'loss' FROM job_events WHERE job_id = ANY(%s) AND kind = 'step' ORDER BY step", list(job_ids))
    return [loss for (loss,) in rows]


def _read_weights(stack: Stack, job_id: str) -> bytes:
    ((path,),) = stack.query("SELECT artifact_path FROM model_versions WHERE job_id = %s", job_id)
    return Path(stack.storage_path, path, "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(stack: Stack) -> str:
    """A job that nobody disturbed."""
    stack.wait_ready()
    jobs = TrainingJobs(stack)
    job_id = jobs.create_job(STEPS)
    jobs.wait_for_end(job_id)
    return job_id


def test_a_paused_job_frees_its_memory_and_ends_as_an_undisturbed_one(stack: Stack, jobs: TrainingJobs, undisturbed: str) -> None:
    job_id = jobs.create_job(STEPS)
    jobs.wait_for_step(job_id, 25)
    child = stack.wait_for_role("train")
    assert jobs.pause(job_id)["state"] == "STATE_PAUSING"
    step = jobs.wait_for_state(job_id, "STATE_PAUSED")["progress"]["step"]
    assert not is_alive(child)
    assert stack.find_role("train") is None
    assert 25 <= step < STEPS
    checkpoints = jobs.list_checkpoints(job_id)
    assert checkpoints[0]["step"] == step
    assert checkpoints[0]["size_bytes"] > 0
    assert jobs.resume(job_id)["state"] == "STATE_QUEUED"
    # The second time it is killed before it can save anything.
    jobs.wait_for_state(job_id, "STATE_RUNNING")
    child = stack.wait_for_role("train")
    child.suspend()
    jobs.pause(job_id)
    child.kill()
    jobs.wait_for_state(job_id, "STATE_PAUSED")
    jobs.resume(job_id)
    ended = jobs.wait_for_end(job_id)
    assert (ended["state"], ended["attempt"]) == ("STATE_SUCCEEDED", 3)
    resumed = stack.query("SELECT (payload->>'resumed_from_step')::int FROM job_events WHERE job_id = %s AND kind = 'started'", job_id)
    assert sorted(row[0] for row in resumed)[:2] == [0, step]
    jobs.assert_whole_log(job_id, STEPS)
    assert _read_losses(stack, job_id) == _read_losses(stack, undisturbed)
    assert _read_weights(stack, job_id) == _read_weights(stack, undisturbed)
    states = [(each["attempt"], each["state"]) for each in jobs.list_attempts(job_id)]
    assert states == [(3, "STATE_SUCCEEDED"), (2, "STATE_PAUSED"), (1, "STATE_PAUSED")]


def test_a_retry_goes_on_from_the_checkpoint_of_the_failed_job(stack: Stack, jobs: TrainingJobs, undisturbed: str) -> None:
    created = jobs.create(STEPS)
    job_id, model_id = created["training_job"]["job_id"], created["model"]["model_id"]
    jobs.wait_for_step(job_id, 45)
    base = Path(stack.make_tiny_model())
    aside = base.with_name("away")
    base.rename(aside)  # the next attempt finds no base model
    try:
        stack.wait_for_role("train").kill()
        failed = jobs.wait_for_end(job_id)
    finally:
        aside.rename(base)
    assert (failed["state"], failed["state_reason"]) == ("STATE_FAILED", "BASE_MODEL_UNAVAILABLE")
    retry = jobs.retry(job_id)
    assert (retry["attempt"], retry["retry_of_job_id"]) == (3, job_id)
    again = httpx.post(f"{stack.api}/training-jobs/{job_id}/retry", json={}, timeout=30)
    assert again.status_code == 400
    assert json.dumps(retry["job_id"]) in again.text
    ended = jobs.wait_for_end(retry["job_id"])
    assert ended["state"] == "STATE_SUCCEEDED", ended
    ((resumed,),) = stack.query(
        "SELECT payload->>'resumed_from_step' FROM job_events WHERE job_id = %s AND kind = 'started'", retry["job_id"]
    )
    assert int(resumed) >= 40
    assert _read_weights(stack, retry["job_id"]) == _read_weights(stack, undisturbed)
    attempts = jobs.list_attempts(retry["job_id"])
    assert [(each["job_id"] == job_id, each["state"]) for each in attempts] == [
        (False, "STATE_SUCCEEDED"),
        (True, "STATE_FAILED"),
        (True, "STATE_INTERRUPTED"),
    ]
    assert stack.query("SELECT state FROM models WHERE model_id = %s", model_id) == [("READY",)]
