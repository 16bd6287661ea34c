"""A batch generation whose processes are killed: it goes on from what was committed, and no record is lost or answered twice."""

import pytest

from tests.e2e.stack import Stack
from tests.e2e.test_batch_generation import create_batch, download, upload
from tests.integration.jobs import TrainingJobs

RECORDS = 900


@pytest.mark.timeout(600)
def test_killed_in_the_middle_it_loses_and_repeats_nothing(stack: Stack, jobs: TrainingJobs) -> None:
    dataset = upload(stack, [{"text": f"The keeper of house {number}"} for number in range(RECORDS)])
    created = create_batch(stack, dataset["dataset_id"], stack.make_tiny_model(), parameters={"max_tokens": 12, "seed": 3})
    job_id = created.json()["job_id"]
    stack.wait_until(lambda: len(jobs.list_checkpoints(job_id)) >= 1)
    stack.wait_for_role("batch").kill()
    stack.wait_until(lambda: len(jobs.list_checkpoints(job_id)) >= 2)
    # The engine dies, too: what it computes is asked again, and the child lives on.
    child = stack.wait_for_role("batch")
    stack.wait_for_role("engine").kill()
    assert jobs.wait_for_state(job_id, "STATE_SUCCEEDED")["attempt"] == 2
    assert not child.is_running()
    lines = download(stack, job_id)
    assert [line["record"] for line in lines] == list(range(1, RECORDS + 1))
    assert [line["error"] for line in lines if line["error"]] == []
    assert [line["choices"][0]["seed"] for line in lines] == list(range(3, RECORDS + 3))
    started = stack.query(
        "SELECT (payload->>'resumed_from_step')::int FROM job_events WHERE job_id = %s AND kind = 'started' ORDER BY sequence", job_id
    )
    assert started[0] == (0,)
    assert 0 < started[1][0] < RECORDS
