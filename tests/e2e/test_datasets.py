"""Datasets through the whole stack: imported, previewed and trained on, over REST and gRPC."""

import json
from pathlib import Path
from typing import Any

import httpx
import pyarrow
import pytest
import zstandard
from modeltraining.v1 import training_service_pb2
from pyarrow import parquet

from tests.e2e.calls import Refusal, call_grpc, call_rest
from tests.e2e.stack import Stack

TALKS = [[{"from": "human", "value": f"Who keeps map {number}?"}, {"from": "gpt", "value": "The keeper."}] for number in range(12)]


def import_file(stack: Stack, name: str, **more: Any) -> list[dict[str, Any]]:
    """Import a file below the root; give the events."""
    request = {"display_name": name, "uri": f"file://{stack.imports_path}/{name}", **more}
    with httpx.stream("POST", f"{stack.api}/datasets/import", json=request, timeout=60) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        return [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]


@pytest.fixture(scope="module")
def dataset(stack: Stack) -> dict[str, Any]:
    parquet.write_table(pyarrow.table({"conversations": TALKS}), stack.imports_path / "talks.parquet")
    found: dict[str, Any] = import_file(stack, "talks.parquet")[-1]["dataset"]
    return found


def test_a_file_below_the_root_is_imported(stack: Stack, dataset: dict[str, Any]) -> None:
    described = (dataset["format"], dataset["record_kind"], dataset["record_count"])
    assert described == ("FORMAT_PARQUET", "RECORD_KIND_SHAREGPT", 12)
    assert dataset["source_uri"].endswith("/talks.parquet")
    assert httpx.get(f"{stack.api}/datasets/{dataset['dataset_id']}").json() == dataset


def test_what_cannot_be_imported_is_refused_and_says_why(stack: Stack, tmp_path: Path) -> None:
    (stack.imports_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    (stack.imports_path / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    for name, code in (("bad.jsonl", "INVALID_ARGUMENT"), ("link.jsonl", "INVALID_ARGUMENT"), ("missing", "NOT_FOUND")):
        request = {"display_name": "d", "uri": f"file://{stack.imports_path}/{name}"}
        answers = (
            call_grpc(stack.grpc_target, "TrainingService/ImportDataset", request),
            call_rest(stack.url, "TrainingService/ImportDataset", request),
        )
        for answer in answers:
            assert isinstance(answer, Refusal), answer
            assert answer.code == code
            assert "secret" not in answer.raw


def test_a_preview_shows_what_the_base_model_reads_page_by_page(stack: Stack, dataset: dict[str, Any]) -> None:
    request = {"dataset_id": dataset["dataset_id"], "base_model": stack.make_tiny_model(), "page_size": 5}
    pages, token = [], ""
    for _ in range(3):
        answer = call_rest(stack.url, "TrainingService/PreviewDataset", {**request, "page_token": token})
        assert isinstance(answer, httpx.Response), answer
        pages.append(answer.json())
        token = pages[-1]["next_page_token"]
    assert token == ""
    records = [record for page in pages for record in page["records"]]
    assert [record["record"] for record in records] == list(range(1, 13))
    (sequence,) = records[6]["sequences"]
    trained = "".join(piece["text"] for piece in sequence["tokens"] if piece["trained"])
    assert trained == "The keeper.<|im_end|>"
    assert "Who keeps map 6?" in "".join(piece["text"] for piece in sequence["tokens"])
    same = call_grpc(stack.grpc_target, "TrainingService/PreviewDataset", {**request, "records": [7]})
    assert isinstance(same, training_service_pb2.PreviewDatasetResponse)
    assert [piece.token_id for piece in same.records[0].sequences[0].tokens] == [piece["token_id"] for piece in sequence["tokens"]]


@pytest.mark.parametrize("change", [{"records": [13]}, {"base_model": "no/such-model"}, {"page_size": 0}, {"max_sequence_tokens": 1}])
def test_a_senseless_preview_is_refused(stack: Stack, dataset: dict[str, Any], change: dict[str, Any]) -> None:
    request = {"dataset_id": dataset["dataset_id"], "base_model": stack.make_tiny_model(), **change}
    answer = call_grpc(stack.grpc_target, "TrainingService/PreviewDataset", request)
    assert isinstance(answer, Refusal), answer
    assert answer.code == "INVALID_ARGUMENT"
    assert {name.split("[")[0] for name in answer.fields} == set(change)


def test_a_packed_upload_is_trained_and_the_job_tells_what_was_found(stack: Stack) -> None:
    rows = "question,text\n" + "".join(f'{number},"The river, number {number}."\n' for number in range(8)) + '9,"' + "map " * 300 + '"\n'
    packed = zstandard.compress(rows.encode())
    dataset = httpx.post(f"{stack.api}/datasets", params={"display_name": "packed"}, content=packed).json()
    described = (dataset["format"], dataset["compression"], dataset["record_kind"], dataset["record_count"])
    assert described == ("FORMAT_CSV", "COMPRESSION_ZSTD", "RECORD_KIND_TEXT", 9)
    request = {
        "display_name": "river", "base_model": stack.make_tiny_model(), "dataset_id": dataset["dataset_id"],
        "parameters": {"max_steps": 2, "max_sequence_tokens": 128, "overlong_policy": "OVERLONG_POLICY_SPLIT"},
    }  # fmt: skip
    job = httpx.post(f"{stack.api}/models/fine-tune", json=request, timeout=60).json()["training_job"]
    url = f"{stack.api}/training-jobs/{job['job_id']}"
    stack.wait_until(lambda: httpx.get(url).json()["state"] in ("STATE_SUCCEEDED", "STATE_FAILED"))
    assert httpx.get(url).json()["state"] == "STATE_SUCCEEDED"
    events = httpx.get(f"{url}/events").json()["events"]
    (checked,) = [event["data_checked"] for event in events if "data_checked" in event]
    assert (checked["cut_records"], checked["dropped_records"]) == (1, 0)
    assert checked["train_sequences"] > 9
    assert [(finding["code"], finding["count"]) for finding in checked["findings"]] == [("OVERLONG", 1)]
    assert sum(bucket["count"] for bucket in checked["lengths"]) == 9
