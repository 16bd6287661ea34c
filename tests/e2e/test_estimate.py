"""The estimate and the admission as a user meets them: by REST through Envoy and by gRPC, the same numbers."""

import json
import time
from typing import Any

import httpx
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from tests.e2e.calls import call_grpc
from tests.e2e.stack import Stack

RECORDS = [{"prompt": "1 + 1 =", "completion": " 2"}] * 50


@pytest.fixture(scope="module", autouse=True)
def measured(stack: Stack) -> float:
    """Wait until records are measured by the model's own tokenizer: the packaged model is converted at its first use."""
    deadline = time.monotonic() + 120
    while True:
        body = {"base_model": "smollm2", "inline_records": RECORDS, "parameters": {"epochs": 1}}
        tokens = httpx.post(f"{stack.api}/models/fine-tune/estimate", json=body, timeout=60).json()["tokens"]
        if tokens["low"] == tokens["high"]:
            return float(tokens["expected"])
        assert time.monotonic() < deadline
        time.sleep(1)


def estimate(stack: Stack, **changes: Any) -> Any:
    body = {"base_model": "smollm2", "inline_records": RECORDS, **changes}
    by_rest = httpx.post(f"{stack.api}/models/fine-tune/estimate", json=body, timeout=60)
    assert by_rest.is_success, by_rest.text
    by_grpc = call_grpc(stack.grpc_target, "ModelService/EstimateFineTune", {"fine_tune": body})
    assert isinstance(by_grpc, Message), by_grpc
    printed = json_format.MessageToDict(by_grpc, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    assert {**by_rest.json(), "duration_seconds": 0} == {**printed, "duration_seconds": 0}
    return by_rest.json()


def test_a_small_job_fits_and_every_figure_is_given(stack: Stack) -> None:
    found = estimate(stack, parameters={"epochs": 2, "batch_size": 10})
    assert found["verdict"] == "VERDICT_FITS"
    assert found["steps"]["expected"] == 10
    for figure in ("memory_bytes", "disk_bytes", "tokens", "duration_seconds"):
        assert 0 < found[figure]["low"] <= found[figure]["expected"] <= found[figure]["high"]


def test_tokens_are_those_that_a_preview_shows(stack: Stack, measured: float) -> None:
    lines = "\n".join(map(json.dumps, RECORDS))
    dataset = httpx.post(f"{stack.api}/datasets?display_name=few", content=lines, timeout=60).json()
    shown = httpx.get(f"{stack.api}/datasets/{dataset['dataset_id']}/preview?base_model=smollm2&page_size=1", timeout=60).json()
    assert measured == len(RECORDS) * shown["records"][0]["sequences"][0]["token_count"]


@pytest.mark.parametrize(("base_model", "technique"), [("llama-3.1-70b", "qlora"), ("falcon-40b", "lora"), ("mistral-7b", "full")])
def test_what_does_not_fit_is_told_from_the_published_configuration(stack: Stack, base_model: str, technique: str) -> None:
    found = estimate(stack, base_model=base_model, **{technique: {}})
    assert found["verdict"] in ("VERDICT_FITS_WITH", "VERDICT_DOES_NOT_FIT")
    assert found["findings"][0]["code"] == "DOES_NOT_FIT"
    assert found["memory_bytes"]["expected"] > 20e9


def test_a_job_that_cannot_fit_is_refused_with_what_to_change(stack: Stack) -> None:
    batch = {"batch_size": 4096, "micro_batch_tokens": 1 << 20, "max_sequence_tokens": 8192}
    records = [{"prompt": "word " * 6_000, "completion": " end"}] * 40
    body = {"display_name": "huge", "base_model": "smollm2", "inline_records": records, "full": {}, "parameters": batch}
    refused = httpx.post(f"{stack.api}/models/fine-tune", json=body, timeout=60)
    assert refused.status_code == 400, refused.text
    info = next(detail for detail in refused.json()["details"] if detail.get("reason"))
    assert info["reason"] == "DOES_NOT_FIT"
    assert "fits" in info["metadata"]["suggestion"]
    models = httpx.get(f"{stack.api}/models?page_size=1000", timeout=30).json()["models"]
    assert "huge" not in [model["display_name"] for model in models]
