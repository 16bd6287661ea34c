"""REST through Envoy onto the real service: users must not notice that there is gRPC behind it, above all when something is wrong."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from modeltraining.v1 import (
    message_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    technique_pb2,
    training_service_pb2,
    training_service_pb2_grpc,
)

from tests.api.conftest import run_envoy
from tests.api.trouble import read_detail, read_status, serve_trouble

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECORD = {"prompt": "1 + 1 =", "completion": " 2"}
LINE = json.dumps(RECORD).encode() + b"\n"


def read_bad_fields(answer: httpx.Response) -> list[str]:
    """Read which fields an answer calls bad."""
    details = answer.json()["details"]
    return sorted(entry["field"] for detail in details for entry in detail.get("field_violations", []))


def read_reason(answer: httpx.Response) -> str:
    """Read the stable reason of an error."""
    return str(next(detail["reason"] for detail in answer.json()["details"] if detail["@type"].endswith("ErrorInfo")))


async def read_events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Read server-sent events as they come."""
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def create_job(rest: httpx.AsyncClient) -> dict[str, Any]:
    """Start a fine-tuning that no worker will take."""
    body = {"display_name": "m", "base_model": BASE_MODEL, "inline_records": [RECORD], "lora": {"rank": 4}, "typo": 1}
    made = await rest.post("/models/fine-tune", json=body)
    assert made.status_code == 200, made.text
    answer: dict[str, Any] = made.json()
    return answer


async def test_a_resource_comes_unwrapped_in_snake_case_with_its_zeros(rest: httpx.AsyncClient) -> None:
    made = await create_job(rest)
    model = (await rest.get(f"/models/{made['model']['model_id']}")).json()
    job = (await rest.get(f"/training-jobs/{made['training_job']['job_id']}")).json()
    assert (model["type"], model["state"], model["version_count"]) == ("TYPE_FINE_TUNED", "STATE_CREATING", 0)
    assert (job["state"], job["queue_position"], job["progress"]["step"]) == ("STATE_QUEUED", 1, 0)
    config = job["effective_config"]["fine_tune"]
    assert (config["lora"]["rank"], config["parameters"]["batch_size"], config["parameters"]["learning_rate"]) == (4, 16, 0.001)
    assert job["create_time"].endswith("Z")


async def test_all_bad_fields_are_named_at_once(rest: httpx.AsyncClient) -> None:
    body = {
        "display_name": "", "base_model": "unknown", "inline_records": [{"messages": [{"role": "boss", "content": "x"}]}],
        "peft": {}, "parameters": {"learning_rate": "NaN", "epochs": 1e9, "scheduler": 99, "early_stopping": {}},
    }  # fmt: skip
    answer = await rest.post("/models/fine-tune", json=body)
    assert answer.status_code == 400
    assert read_bad_fields(answer) == sorted(
        ["display_name", "base_model", "inline_records[0]", "peft.method", "parameters.learning_rate", "parameters.epochs",
         "parameters.scheduler", "parameters.early_stopping"]
    )  # fmt: skip
    asked = {"model_id": "x", "messages": [{"role": "boss", "content": "x"}], "parameters": {"temperature": -1, "max_tokens": 10**9}}
    answer = await rest.post("/inference", json=asked)
    assert read_bad_fields(answer) == ["messages[0].role", "parameters.max_tokens", "parameters.temperature"]


@pytest.mark.parametrize(
    ("verb", "path", "reason"),
    [
        ("GET", "/models/mdl_unknown", "MODEL_NOT_FOUND"),
        ("DELETE", "/models/mdl_unknown", "MODEL_NOT_FOUND"),
        ("GET", "/models/a%20b'%22;--", "MODEL_NOT_FOUND"),
        ("GET", "/training-jobs/job_unknown", "JOB_NOT_FOUND"),
        ("GET", "/training-jobs/job_unknown/watch", "JOB_NOT_FOUND"),
        ("POST", "/training-jobs/job_unknown/cancel", "JOB_NOT_FOUND"),
        ("GET", "/datasets/ds_unknown", "DATASET_NOT_FOUND"),
        ("GET", "/models/mdl_1:typo", "PATH_NOT_FOUND"),
        ("GET", "/nothing", "PATH_NOT_FOUND"),
        ("PUT", "/models", "PATH_NOT_FOUND"),
    ],
)
async def test_what_is_not_there_is_not_found(rest: httpx.AsyncClient, verb: str, path: str, reason: str) -> None:
    answer = await rest.request(verb, path)
    assert (answer.status_code, answer.json()["code"], read_reason(answer)) == (404, 5, reason)
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/inference", b'{"model_id":'),
        ("/inference", b"[1]"),
        ("/inference", b'{"model_id": {}}'),
        ("/inference", b'{"parameters": {"max_tokens": 99999999999}}'),
        ("/inference", b"\xff\xfe"),
        ("/models/fine-tune", b'{"parameters": {"loss_on": "LOSS_ON_NOTHING"}}'),
    ],
)
async def test_what_is_no_request_is_refused_as_json(rest: httpx.AsyncClient, path: str, body: bytes) -> None:
    answer = await rest.post(path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"], read_reason(answer)) == (400, 3, "REQUEST_MALFORMED")


@pytest.mark.parametrize("path", ["/models/..%2f..%2fetc", "/models/%2e%2e%2fx", "/models?page_sise=3", "/models?page_size=x"])
async def test_tricks_and_typos_in_the_path_are_refused(rest: httpx.AsyncClient, path: str) -> None:
    answer = await rest.get(path)
    assert (answer.status_code, answer.json()["code"]) == (400, 3)


async def test_a_body_over_the_limit_is_refused(rest: httpx.AsyncClient) -> None:
    answer = await rest.post("/inference", content=b" " * (33 << 20))
    assert (answer.status_code, read_reason(answer)) == (413, "BODY_TOO_LARGE")


async def test_a_service_that_is_down_says_so(rest: httpx.AsyncClient) -> None:
    answer = await rest.post("/inference/stream", json={"model_id": BASE_MODEL, "messages": [{"role": "user", "content": "x"}]})
    assert (answer.status_code, answer.json()["code"]) == (503, 14)


async def test_a_job_is_watched_as_events_until_it_ends(rest: httpx.AsyncClient) -> None:
    job_id = (await create_job(rest))["training_job"]["job_id"]
    seen: list[dict[str, Any]] = []
    async with rest.stream("GET", f"/training-jobs/{job_id}/watch") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        async for event in read_events(answer):
            seen.append(event)
            if "snapshot" in event:
                assert (await rest.post(f"/training-jobs/{job_id}/cancel")).json()["state"] == "STATE_CANCELLED"
    assert "snapshot" in seen[0]
    assert seen[-1]["finished"]["job"]["state"] == "STATE_CANCELLED"
    numbers = [event["sequence"] for event in seen[1:-1]]
    assert numbers == list(range(1, len(numbers) + 1))
    again = await rest.get(f"/training-jobs/{job_id}/watch", params={"after_sequence": numbers[-1]})
    assert again.text.count("data: ") == 2
    assert (await rest.post(f"/training-jobs/{job_id}/cancel")).status_code == 200


@pytest.mark.parametrize("trouble", ["bug", "unavailable", "cancelled"])
async def test_a_stream_that_fails_in_the_middle_says_so_in_its_last_event(tmp_path: Path, trouble: str) -> None:
    async with serve_trouble() as client, run_envoy(client.port, tmp_path) as rest:
        answer = await rest.post("/inference/stream", json={"model_id": trouble, "prompt": "2"})
        events = [event async for event in read_events(answer)]
        assert [next(iter(event)) for event in events] == ["delta", "delta", "error"]
        assert events[-1]["error"]["code"] in (13, 14)
        before = await rest.post("/inference/stream", json={"model_id": trouble, "prompt": "0"})
        assert before.status_code in (500, 503)
        assert "secret" not in answer.text + before.text


async def test_a_rest_client_that_leaves_ends_the_handler(tmp_path: Path) -> None:
    async with serve_trouble() as client, run_envoy(client.port, tmp_path) as rest:
        async with rest.stream("POST", "/inference/stream", json={"model_id": "hang", "prompt": "1"}) as answer:
            assert "delta" in await anext(read_events(answer))
        await asyncio.wait_for(client.servicer.left.wait(), 5)


async def upload(rest: httpx.AsyncClient, pieces: Sequence[bytes], **query: str) -> httpx.Response:
    """Upload records in pieces, the size not known beforehand."""

    async def send() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return await rest.post("/datasets", params=query, content=send())


async def test_records_are_uploaded_as_a_body(rest: httpx.AsyncClient) -> None:
    answer = await upload(rest, [LINE * 1_000, LINE[:10], LINE[10:], b"no record\n"], display_name="My records")
    dataset = answer.json()
    assert answer.status_code == 200, answer.text
    assert (dataset["record_count"], dataset["invalid_record_count"], dataset["display_name"]) == (1_001, 1, "My records")
    assert [(finding["line"], finding["code"]) for finding in dataset["findings"][-1:]] == [(1_002, "BROKEN_JSON")]
    counts = {finding["code"]: (finding["severity"], finding["count"]) for finding in dataset["finding_counts"]}
    assert counts == {"DUPLICATE": ("SEVERITY_WARNING", 1_000), "BROKEN_JSON": ("SEVERITY_ERROR", 1)}
    assert (await rest.get(f"/datasets/{dataset['dataset_id']}")).json() == dataset
    assert (await rest.delete(f"/datasets/{dataset['dataset_id']}")).json() == {}
    assert (await rest.get(f"/datasets/{dataset['dataset_id']}")).status_code == 404


async def test_an_import_streams_how_far_it_is_and_ends_with_its_dataset_or_error(rest: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "imports").mkdir()
    (tmp_path / "imports" / "records.jsonl").write_bytes(LINE * 10)
    request = {"display_name": "d", "uri": f"file://{tmp_path}/imports/records.jsonl", "record_kind": "RECORD_KIND_COMPLETION"}
    async with rest.stream("POST", "/datasets/import", json=request) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        events = [event async for event in read_events(answer)]
    assert all(list(event) == ["progress"] for event in events[:-1])
    dataset = events[-1]["dataset"]
    assert (dataset["record_count"], dataset["source_uri"]) == (10, request["uri"])
    refused = await rest.post("/datasets/import", json={"display_name": "d", "uri": f"file://{tmp_path}/storage/x"})
    assert (refused.status_code, read_bad_fields(refused)) == (400, ["uri"])


@pytest.mark.parametrize(
    ("pieces", "query", "status"),
    [
        ([], {"display_name": "empty"}, 400),
        ([b"no record\n"], {"display_name": "bad"}, 400),
        ([LINE] * 200, {}, 400),
        ([LINE], {"display_name": "d", "format": "FORMAT_PARQUET"}, 400),
        ([LINE * 1_000] * 200, {"display_name": "too large"}, 429),
    ],
)
async def test_a_bad_upload_is_refused(rest: httpx.AsyncClient, pieces: list[bytes], query: dict[str, str], status: int) -> None:
    answer = await upload(rest, pieces, **query)
    assert answer.status_code == status, answer.text
    assert (await rest.get("/datasets")).json() == {"datasets": [], "next_page_token": ""}


async def test_spoofed_ids_are_not_believed(rest: httpx.AsyncClient) -> None:
    answer = await rest.get("/models", headers={"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") != ["mine"]
    assert len(answer.headers.get_list("x-request-id")) == 1


async def test_pages_follow_each_other(rest: httpx.AsyncClient) -> None:
    made = [(await create_job(rest))["model"]["model_id"] for _ in range(3)]
    first = (await rest.get("/models", params={"page_size": 2})).json()
    second = (await rest.get("/models", params={"page_size": 2, "page_token": first["next_page_token"]})).json()
    assert [model["model_id"] for model in first["models"] + second["models"]] == made[::-1]
    assert second["next_page_token"] == ""
    wrong = await rest.get("/models", params={"page_token": first["next_page_token"], "state": "STATE_READY"})
    assert (wrong.status_code, read_bad_fields(wrong)) == (400, ["page_token"])


async def test_the_catalogue_is_listed(rest: httpx.AsyncClient) -> None:
    base, embedding = await asyncio.gather(rest.get("/base-models"), rest.get("/embedding-models"))
    packaged = next(model for model in base.json()["base_models"] if model["base_model_id"] == BASE_MODEL)
    assert packaged["availability"] == "AVAILABILITY_LOCAL"
    assert packaged["parameter_count"] == 134_515_008
    assert any(model["availability"] == "AVAILABILITY_UNAVAILABLE" for model in embedding.json()["embedding_models"])


async def test_the_same_port_speaks_grpc(rest: httpx.AsyncClient) -> None:
    async with aio.insecure_channel(f"{rest.base_url.host}:{rest.base_url.port}") as channel:
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        assert not (await models.ListModels(model_service_pb2.ListModelsRequest())).models
        record = message_pb2.TrainingRecord(prompt="x", completion="y")
        bad = model_service_pb2.CreateFineTunedModelRequest(inline_records=[record], lora=technique_pb2.LoraTechnique(rank=0))
        with pytest.raises(aio.AioRpcError) as failure:
            await models.CreateFineTunedModel(bad)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        details = read_detail(read_status(failure.value), error_details_pb2.BadRequest)
        assert details is not None
        assert sorted(entry.field for entry in details.field_violations) == ["base_model", "display_name", "lora.rank"]
        with pytest.raises(aio.AioRpcError) as missing:
            await models.GetModel(model_service_pb2.GetModelRequest(model_id="../../etc/passwd"))
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND
        jobs = training_service_pb2_grpc.TrainingServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as gone:
            await jobs.WatchTrainingJob(training_service_pb2.WatchTrainingJobRequest(job_id="job_x")).read()
        assert gone.value.code() is grpc.StatusCode.NOT_FOUND
