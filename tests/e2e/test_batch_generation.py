"""A dataset answered as a job, through REST: what becomes of each record, and the result as a download."""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from tests.e2e.calls import Refusal, call_grpc
from tests.e2e.stack import Stack
from tests.integration.jobs import TrainingJobs

RECORDS: Sequence[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Who keeps the maps?"}, {"role": "assistant", "content": "The keeper."}]},
    {"prompt": "Who keeps map 2?", "completion": " The keeper of house 2."},
    {"text": "keeper " * 3_000},
    {"text": "The keeper of"},
    {"instruction": "Name the keeper.", "output": "It is the keeper of the blue house."},
]


def upload(stack: Stack, records: Sequence[dict[str, Any]], **query: str) -> dict[str, Any]:
    """Upload records as a dataset."""
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    response = httpx.post(f"{stack.api}/datasets", params={"display_name": "Questions", **query}, content=data, timeout=60)
    assert response.is_success, response.text
    dataset: dict[str, Any] = response.json()
    return dataset


def create_batch(stack: Stack, dataset_id: str, model_id: str, **more: Any) -> httpx.Response:
    """Ask for a batch generation."""
    body = {"model_id": model_id, "dataset_id": dataset_id, "parameters": {"max_tokens": 8, "temperature": 0}, **more}
    return httpx.post(f"{stack.api}/inference/batch", json=body, timeout=60)


def download(stack: Stack, job_id: str) -> list[dict[str, Any]]:
    """Download a job's result, line by line."""
    response = httpx.get(f"{stack.api}/training-jobs/{job_id}/result", timeout=60)
    assert response.is_success, response.text
    assert response.headers["content-type"] == "application/jsonl"
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.timeout(300)
def test_a_dataset_is_answered_record_by_record_and_downloaded(stack: Stack) -> None:
    stack.wait_ready()
    jobs, model_id = TrainingJobs(stack), stack.make_tiny_model()
    dataset = upload(stack, RECORDS)
    response = create_batch(stack, dataset["dataset_id"], model_id, request_id="batch-of-the-end-to-end-test")
    assert response.is_success, response.text
    job = response.json()
    assert (job["kind"], job["model_id"], job["state"]) == ("KIND_BATCH_GENERATION", model_id, "STATE_QUEUED")
    config = job["effective_config"]["batch_generation"]
    assert (config["dataset_id"], config["dataset_sha256"]) == (dataset["dataset_id"], dataset["sha256"])
    assert (config["parameters"]["max_tokens"], config["parameters"]["top_p"]) == (8, 1.0)
    again = create_batch(stack, dataset["dataset_id"], model_id, request_id="batch-of-the-end-to-end-test").json()
    assert again["job_id"] == job["job_id"]
    ended = jobs.wait_for_end(job["job_id"])
    assert ended["state"] == "STATE_SUCCEEDED", ended
    counted = ended["progress"]["batch"]
    assert (counted["answered_records"], counted["failed_records"], ended["progress"]["step"]) == (4, 1, 5)
    lines = download(stack, job["job_id"])
    assert [line["record"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["error"] and line["error"]["reason"] for line in lines] == [None, None, "PROMPT_TOO_LONG", None, None]
    answered = [line for line in lines if not line["error"]]
    assert all(1 <= line["usage"]["completion_tokens"] <= 8 and line["choices"][0]["finish_reason"] for line in answered)
    assert sum(line["usage"]["completion_tokens"] for line in answered) == counted["completion_tokens"]
    assert {event["batch"]["failed_records"] for event in jobs.watch(job["job_id"]) if "batch" in event} >= {1}
    listed = httpx.get(f"{stack.api}/training-jobs", params={"kind": "KIND_BATCH_GENERATION", "model_id": model_id}, timeout=60).json()
    assert job["job_id"] in {each["job_id"] for each in listed["training_jobs"]}


@pytest.mark.timeout(300)
def test_prompts_without_answers_are_a_dataset_of_their_own_kind(stack: Stack) -> None:
    stack.wait_ready()
    jobs, model_id = TrainingJobs(stack), stack.make_tiny_model()
    records = [{"messages": [{"role": "user", "content": f"Who keeps map {number}?"}]} for number in range(3)]
    dataset = upload(stack, records, record_kind="RECORD_KIND_PROMPT")
    created = create_batch(stack, dataset["dataset_id"], model_id, parameters={"max_tokens": 4, "temperature": 1, "n": 2, "seed": 7})
    jobs.wait_for_state(created.json()["job_id"], "STATE_SUCCEEDED")
    lines = download(stack, created.json()["job_id"])
    assert [choice["seed"] for line in lines for choice in line["choices"]] == [7, 8, 9, 10, 11, 12]


def test_every_bad_field_is_named_at_once_and_a_job_without_a_result_says_so(stack: Stack) -> None:
    stack.wait_ready()
    request = {"model_id": "no/such-model", "dataset_id": "ds_none", "parameters": {"temperature": 9, "top_p": 0}}
    refused = call_grpc(stack.grpc_target, "InferenceService/CreateBatchGeneration", request)
    assert isinstance(refused, Refusal)
    assert refused.code == "INVALID_ARGUMENT"
    assert refused.fields >= {"dataset_id", "parameters.temperature", "parameters.top_p"}
    missing = httpx.get(f"{stack.api}/training-jobs/job_none/result", timeout=60)
    assert missing.status_code == 404, missing.text
