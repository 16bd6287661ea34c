"""A whole stack whose storage is a bucket: fine-tuned, answered record by record through two deaths, the result downloaded from there."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.storage.objects import RemoteObjects
from tests.e2e.stack import Stack
from tests.e2e.test_batch_generation import create_batch, download, upload
from tests.integration.jobs import TrainingJobs
from tests.remote_storage import make_bucket, run_s3

RECORDS = 600


@pytest.fixture(scope="module")
def remote() -> Iterator[tuple[Stack, RemoteObjects]]:
    """The stack, and what lies in its bucket."""
    with run_s3(), tempfile.TemporaryDirectory(prefix="stack-") as directory:
        url = make_bucket()
        running = Stack(Path(directory), {"MODEL_STORAGE_PATH": url})
        try:
            running.wait_ready()
            yield running, RemoteObjects(url)
        finally:
            running.stop()


@pytest.mark.timeout(600)
def test_a_dataset_is_answered_by_a_fine_tuned_model_with_all_files_in_a_bucket(remote: tuple[Stack, RemoteObjects]) -> None:
    stack, objects = remote
    jobs = TrainingJobs(stack)
    created = jobs.create(max_steps=2)
    model_id = created["model"]["model_id"]
    jobs.wait_for_state(created["training_job"]["job_id"], "STATE_SUCCEEDED")
    dataset = upload(stack, [{"text": f"The keeper of house {number}"} for number in range(RECORDS)])
    job: dict[str, Any] = create_batch(stack, dataset["dataset_id"], model_id, parameters={"max_tokens": 12, "seed": 3}).json()
    job_id = job["job_id"]
    stack.wait_until(lambda: len(jobs.list_checkpoints(job_id)) >= 1)
    stack.wait_for_role("batch").kill()
    assert jobs.wait_for_state(job_id, "STATE_SUCCEEDED")["attempt"] == 2
    lines = download(stack, job_id)
    assert [line["record"] for line in lines] == list(range(1, RECORDS + 1))
    assert [line["choices"][0]["seed"] for line in lines] == list(range(3, RECORDS + 3))
    kept = [stored.key for stored in objects.list() if job_id in stored.key]
    assert kept
    assert not list(stack.storage_path.rglob(f"*{job_id}*")), "nothing of it lies where storage would be"
    httpx.delete(f"{stack.api}/models/{model_id}", timeout=60).raise_for_status()
    assert httpx.get(f"{stack.api}/training-jobs/{job_id}/result", timeout=60).status_code == httpx.codes.NOT_FOUND
