"""What a caller may do to a job, through REST and gRPC alike: pause, resume, retry, and read its attempts, events and checkpoints."""

import json
from typing import Any

import httpx
import pytest
from google.protobuf import json_format

from tests.e2e.calls import Refusal, call_grpc, call_rest
from tests.e2e.stack import Stack
from tests.integration.jobs import TrainingJobs


class _Caller:
    """Calls TrainingService by one of the two ways; answers come in one form."""

    def __init__(self, stack: Stack, way: str) -> None:
        self._stack = stack
        self._way = way

    def call(self, name: str, **request: Any) -> dict[str, Any]:
        """Call a method that must not fail."""
        method = f"TrainingService/{name}"
        if self._way == "grpc":
            answer = call_grpc(self._stack.grpc_target, method, request)
            assert not isinstance(answer, Refusal), answer
            text = json_format.MessageToJson(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            found: dict[str, Any] = json.loads(text)
            return found
        response = call_rest(self._stack.url, method, request)
        assert isinstance(response, httpx.Response), response
        read: dict[str, Any] = response.json()
        return read

    def refuse(self, name: str, **request: Any) -> Refusal:
        """Call a method that must fail."""
        method = f"TrainingService/{name}"
        call = call_grpc(self._stack.grpc_target, method, request) if self._way == "grpc" else call_rest(self._stack.url, method, request)
        assert isinstance(call, Refusal), call
        return call


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["rest", "grpc"])
def test_a_job_is_paused_resumed_cancelled_and_tried_again(stack: Stack, way: str) -> None:
    stack.wait_ready()
    jobs, caller = TrainingJobs(stack), _Caller(stack, way)
    job_id = jobs.create_job(100_000)
    assert caller.call("PauseTrainingJob", job_id=job_id)["state"] in ("STATE_PAUSING", "STATE_PAUSED")
    jobs.wait_for_state(job_id, "STATE_PAUSED")
    assert caller.call("PauseTrainingJob", job_id=job_id)["state"] == "STATE_PAUSED"
    resumed = caller.call("ResumeTrainingJob", job_id=job_id)
    assert (resumed["state"], resumed["attempt"]) == ("STATE_QUEUED", 2)
    assert caller.refuse("ResumeTrainingJob", job_id=job_id).reason == "JOB_NOT_PAUSED"
    assert caller.refuse("RetryTrainingJob", job_id=job_id).reason == "JOB_CANNOT_RETRY"
    jobs.cancel(job_id)
    jobs.wait_for_end(job_id)
    assert caller.refuse("PauseTrainingJob", job_id=job_id).reason == "JOB_FINISHED"
    retry = caller.call("RetryTrainingJob", job_id=job_id)
    assert (retry["retry_of_job_id"], retry["attempt"], retry["state"]) == (job_id, 3, "STATE_QUEUED")
    assert retry["effective_config"] == jobs.read(job_id)["effective_config"]
    refused = caller.refuse("RetryTrainingJob", job_id=job_id)
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "JOB_RETRIED")
    jobs.cancel(retry["job_id"])
    jobs.wait_for_end(retry["job_id"])
    _check_attempts(caller, job_id, retry["job_id"])
    _check_events(caller, job_id)
    assert caller.call("ListCheckpoints", job_id=job_id).get("checkpoints", []) == []


def _check_attempts(caller: _Caller, job_id: str, retry_id: str) -> None:
    first = caller.call("ListTrainingJobAttempts", job_id=retry_id, page_size=2)
    rest = caller.call("ListTrainingJobAttempts", job_id=retry_id, page_size=2, page_token=first["next_page_token"])
    assert rest["next_page_token"] == ""
    attempts = [(each["attempt"], each["job_id"], each["state"]) for each in first["attempts"] + rest["attempts"]]
    assert attempts == [(3, retry_id, "STATE_CANCELLED"), (2, job_id, "STATE_CANCELLED"), (1, job_id, "STATE_PAUSED")]


def _check_events(caller: _Caller, job_id: str) -> None:
    events, after = [], 0
    while True:
        page = caller.call("ListTrainingJobEvents", job_id=job_id, after_sequence=after, page_size=3)
        events += page["events"]
        if "next_after_sequence" not in page:
            break
        after = page["next_after_sequence"]
        assert after == events[-1]["sequence"]
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    states = [event["state_changed"]["to_state"] for event in events if "state_changed" in event]
    assert states[:2] == ["STATE_VALIDATING", "STATE_QUEUED"]
    assert "STATE_PAUSED" in states
    assert states[-1] == "STATE_CANCELLED"
