"""EvaluateRetrieval through REST and gRPC: the same figures on both, exact ones, and bad fields by their names."""

import json
from typing import Any

import httpx
import pytest
from google.protobuf import json_format
from grpc import aio
from modeltraining.v1 import inference_service_pb2 as pb
from modeltraining.v1 import inference_service_pb2_grpc

from server.db.database import PostgresDatabase
from server.domain.documents import NewDocument
from tests.api.conftest import Api
from tests.api.test_rest import BASE_MODEL, read_bad_fields
from tests.db.samples import add_model, make_rag_model
from tests.services.libraries import index_documents

LEXICAL = {"search_mode": "SEARCH_MODE_LEXICAL"}
QUERIES_OF = ("alpha", "beta")


async def make_body(database: PostgresDatabase) -> dict[str, Any]:
    """A model with two documents, and two queries about the second: found at rank 2 and at rank 1."""
    model = await add_model(database, make_rag_model())
    _, second = await index_documents(database, model, [NewDocument("alpha alpha alpha."), NewDocument("alpha beta gamma.")])
    queries = [{"query": query, "relevant": [{"document_id": second, "char_start": 6, "char_end": 10}]} for query in QUERIES_OF]
    configurations = [{"name": "words", "retrieval": LEXICAL}, {"retrieval": {**LEXICAL, "top_k": 1}}]
    return {"model_id": model.model_id, "queries": queries, "configurations": configurations, "k_values": [2, 1]}


async def test_rest_and_grpc_give_the_same_exact_figures(rest: httpx.AsyncClient, api: Api, database: PostgresDatabase) -> None:
    body = await make_body(database)
    answer = await rest.post("/rag/evaluate", json=body)
    assert answer.status_code == 200, answer.text
    by_rest = answer.json()
    stub = inference_service_pb2_grpc.InferenceServiceStub(api.channel)
    message = await stub.EvaluateRetrieval(json_format.ParseDict(body, pb.EvaluateRetrievalRequest()))
    by_grpc = json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    for evaluation in (by_rest, by_grpc):
        words, one = evaluation["results"]
        assert words["recall"] == [{"k": 1, "recall": 0.5}, {"k": 2, "recall": 1}]
        assert (words["name"], words["mrr_at_10"], words["empty_rate"], words["missed_queries"]) == ("words", 0.75, 0, [])
        assert words["ndcg_at_10"] == pytest.approx((0.6309298 + 1) / 2, abs=1e-6)
        assert (one["name"], one["mrr_at_10"], one["missed_queries"]) == ("2", 0.5, ["alpha"])
        assert (words["retrieval"]["top_k"], one["retrieval"]["top_k"]) == (10, 1)
        assert next(latency["stage"] for latency in words["latencies"]) == "search"
        (comparison,) = evaluation["comparisons"]
        assert (comparison["name"], comparison["baseline"]) == ("2", "words")
        assert [each["measure"] for each in comparison["differences"]] == ["recall_at_2", "mrr_at_10", "ndcg_at_10"]
        assert comparison["differences"][1] == {"measure": "mrr_at_10", "difference": -0.25, "low": -0.5, "high": 0}
        assert (evaluation["query_count"], evaluation["invalid_record_count"]) == (2, 0)


async def test_an_uploaded_dataset_of_queries_gives_what_the_inline_ones_do(rest: httpx.AsyncClient, database: PostgresDatabase) -> None:
    body = await make_body(database)
    queries = body.pop("queries")
    lines = "".join(json.dumps(query) + "\n" for query in [*queries, {"query": "no relevant"}])
    dataset = (await rest.post("/datasets?display_name=q", content=lines.encode())).json()
    assert (dataset["record_kind"], dataset["record_count"], dataset["invalid_record_count"]) == ("RECORD_KIND_RETRIEVAL", 2, 1)
    evaluation = (await rest.post("/rag/evaluate", json={**body, "dataset_id": dataset["dataset_id"]})).json()
    assert [scores["mrr_at_10"] for scores in evaluation["results"]] == [0.75, 0.5]
    assert evaluation["invalid_record_count"] == 1
    tuning = {"display_name": "m", "base_model": BASE_MODEL, "dataset_id": dataset["dataset_id"], "eval_dataset_id": dataset["dataset_id"]}
    refused = await rest.post("/models/fine-tune", json=tuning)
    assert read_bad_fields(refused) == ["dataset_id", "eval_dataset_id"]
    inline = await rest.post("/models/fine-tune", json={**tuning, "dataset_id": "", "eval_dataset_id": "", "inline_records": queries[:1]})
    assert read_bad_fields(inline) == ["inline_records[0]"]


# One Envoy for all: it takes longer to start than all of them.
CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({"queries": []}, ["queries"]),
    ({"dataset_id": "ds_x"}, ["queries"]),
    ({"queries": [{"query": "x"}]}, ["queries[0].relevant"]),
    ({"queries": [{"query": "x", "relevant": [{"char_start": 1}]}]}, ["queries[0].relevant[0].document_id"]),
    ({"queries": [{"query": "x", "relevant": [{"document_id": "doc_x", "char_start": 1}]}]}, ["queries[0].relevant[0].char_end"]),
    ({"queries": [{"query": "x", "relevant": [{"document_id": "doc_x"}]}]}, ["queries[0].relevant[0].document_id"]),
    ({"k_values": [0, 1001]}, ["k_values[0]", "k_values[1]"]),
    ({"seed": -1, "timeout_seconds": 1e9}, ["seed", "timeout_seconds"]),
    ({"timeout_seconds": "NaN"}, ["timeout_seconds"]),
    ({"configurations": [{}] * 9}, ["configurations"]),
    ({"configurations": [{"retrieval": {"top_k": 10**6}}]}, ["configurations[0].retrieval.top_k"]),
    ({"configurations": [{"retrieval": {"similarity_threshold": 2}}]}, ["configurations[0].retrieval.similarity_threshold"]),
    (
        {"configurations": [{"retrieval": {**LEXICAL, "filter": {"conditions": [{"key": "nix", "equals": 1}]}}}]},
        ["configurations[0].retrieval.filter.conditions[0].key"],
    ),
    ({"configurations": [{"retrieval": {"search_mode": 9, "top_k": -1}}]}, [
        "configurations[0].retrieval.search_mode", "configurations[0].retrieval.top_k",
    ]),
]  # fmt: skip


async def test_bad_fields_are_named(rest: httpx.AsyncClient, database: PostgresDatabase) -> None:
    body = await make_body(database)
    for change, fields in CASES:
        refused = await rest.post("/rag/evaluate", json={**body, **change})
        assert refused.status_code == 400, (fields, refused.text)
        assert read_bad_fields(refused) == fields


async def test_no_engine_and_no_model_are_said(rest: httpx.AsyncClient, database: PostgresDatabase) -> None:
    body = await make_body(database)
    assert (await rest.post("/rag/evaluate", json={**body, "configurations": []})).status_code == 503
    assert (await rest.post("/rag/evaluate", json={**body, "model_id": "mdl_no"})).status_code == 404


async def test_a_client_that_gives_up_ends_the_evaluation(api: Api, database: PostgresDatabase) -> None:
    body = await make_body(database)
    request = json_format.ParseDict({**body, "queries": body["queries"] * 500}, pb.EvaluateRetrievalRequest())
    stub = inference_service_pb2_grpc.InferenceServiceStub(api.channel)
    with pytest.raises(aio.AioRpcError) as late:
        await stub.EvaluateRetrieval(request, timeout=0.3)
    assert late.value.code().name == "DEADLINE_EXCEEDED"
