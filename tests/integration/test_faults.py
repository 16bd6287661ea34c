"""kill -9 in the middle of a real fine-tuning: the job goes on by itself, and its log shows nothing of it."""

import pytest

from tests.e2e.stack import Stack, is_alive
from tests.integration.jobs import TrainingJobs

# Several starts of a child, each of which imports torch; much slower beside other work.
pytestmark = pytest.mark.timeout(900)

# The tiny model takes some 10 ms for a step: enough steps that a job still runs when the kill arrives.
STEPS = 400


def _kill(stack: Stack, role: str) -> None:
    process = stack.wait_for_role(role)
    process.kill()
    stack.wait_until(lambda: not is_alive(process))


@pytest.mark.parametrize("role", ["train", "worker", "api", "engine"])
def test_a_job_outlives_the_death_of_a_process(stack: Stack, jobs: TrainingJobs, role: str) -> None:
    created = jobs.create(STEPS)
    job_id, model_id = created["training_job"]["job_id"], created["model"]["model_id"]
    jobs.wait_for_step(job_id, 50)
    child = stack.wait_for_role("train")
    _kill(stack, role)
    if role in ("api", "engine"):
        assert is_alive(child)
    else:
        stack.wait_until(lambda: not is_alive(child))
    job = jobs.wait_for_end(job_id)
    assert job["state"] == "STATE_SUCCEEDED", job
    assert job["attempt"] == (2 if role in ("train", "worker") else 1)
    jobs.assert_whole_log(job_id, STEPS)
    if role in ("train", "worker"):
        resumed = stack.query(
            "SELECT payload->>'resumed_from_step' FROM job_events WHERE job_id = %s AND kind = 'started' ORDER BY 1", job_id
        )
        assert int(resumed[-1][0]) >= 40
    assert stack.query("SELECT version FROM model_versions WHERE model_id = %s", model_id) == [(1,)]
    assert stack.find_role("train") is None


def test_a_job_outlives_one_death_after_the_other(stack: Stack, jobs: TrainingJobs) -> None:
    job_id = jobs.create_job(STEPS)
    for step, role in ((20, "train"), (60, "api"), (120, "worker"), (200, "train")):
        jobs.wait_for_step(job_id, step)
        _kill(stack, role)
    job = jobs.wait_for_end(job_id)
    assert (job["state"], job["attempt"]) == ("STATE_SUCCEEDED", 4)
    jobs.assert_whole_log(job_id, STEPS)


def test_an_interrupted_job_ends_with_the_weights_of_an_undisturbed_one(stack: Stack, jobs: TrainingJobs) -> None:
    ids = [jobs.create_job(200) for _ in range(2)]
    jobs.wait_for_step(ids[0], 50)
    _kill(stack, "worker")
    for job_id in ids:
        jobs.wait_for_end(job_id)
    losses = [
        [row[0] for row in stack.query("SELECT payload->>'loss' FROM job_events WHERE job_id = %s AND kind = 'step' ORDER BY step", job_id)]
        for job_id in ids
    ]
    assert losses[0] == losses[1]
    digests = []
    for job_id in ids:
        ((path,),) = stack.query("SELECT artifact_path FROM model_versions WHERE job_id = %s", job_id)
        digests.append((stack.storage_path / path / "adapter_model.safetensors").read_bytes())
    assert digests[0] == digests[1]


def test_an_index_job_outlives_the_death_of_its_child_and_of_its_worker(stack: Stack, jobs: TrainingJobs) -> None:
    job_id = jobs.create_index_job(documents=120, words=300)
    for step, role in ((5, "index"), (25, "worker")):
        jobs.wait_for_step(job_id, step)
        _kill(stack, role)
    job = jobs.wait_for_end(job_id)
    assert job["state"] == "STATE_SUCCEEDED"
    assert (job["progress"]["step"], job["progress"]["total_steps"]) == (120, 120)
    rows = stack.query("SELECT payload->>'document_id' FROM job_events WHERE job_id = %s AND kind = 'index_progress'", job_id)
    assert len(rows) == len(set(rows)) == 120
