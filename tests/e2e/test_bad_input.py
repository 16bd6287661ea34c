"""Bad input, through REST and gRPC: the same clear error on both, every bad field at once, and nothing of the server's inside."""

import re
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.e2e.calls import Refusal, call_grpc, call_rest, refusal_from_rest
from tests.e2e.stack import Stack

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
NO_JOB, NO_MODEL, NO_DATASET = "job_01k9zzzzzzzzzzzzzzzzzzzz", "mdl_01k9zzzzzzzzzzzzzzzzzzzz", "ds_01k9zzzzzzzzzzzzzzzzzzzz"
RECORD = {"prompt": "1 + 1 =", "completion": " 2"}
USER = {"role": "user", "content": "hi"}
TUNE: dict[str, Any] = {"display_name": "t", "base_model": BASE, "inline_records": [RECORD]}
RAG: dict[str, Any] = {"display_name": "r", "generator_model_id": BASE, "embedding_model": MINILM, "documents": [{"text": "x"}]}
EMBED: dict[str, Any] = {"embedding_model": MINILM, "texts": ["x"], "role": "ROLE_PASSAGE"}
ASK: dict[str, Any] = {"model_id": BASE, "messages": [USER]}
# What no client may see: a traceback, a path of the server, a source file, SQL.
LEAK = re.compile(r"Traceback|/(?:work|tmp|home|root|usr|opt|var)/|\.py\b|psycopg|sqlalchemy|SELECT |postgres", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """A call that must fail, how, and which fields must be named."""

    method: str
    request: dict[str, Any]
    code: str = "INVALID_ARGUMENT"
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method.split('/')[1]}:{'+'.join(self.fields) or self.code}:{str(self.request)[-30:]}"


def tune(fields: tuple[str, ...], **changes: Any) -> Case:
    return Case("ModelService/CreateFineTunedModel", {**TUNE, **changes}, fields=fields)


def number(name: str, value: Any) -> Case:
    return tune((f"parameters.{name}",), parameters={name: value})


def rag(fields: tuple[str, ...], **changes: Any) -> Case:
    return Case("ModelService/CreateRagModel", {**RAG, **changes}, fields=fields)


def ask(fields: tuple[str, ...], **changes: Any) -> Case:
    return Case("InferenceService/Generate", {**ASK, **changes}, fields=fields)


def embed(fields: tuple[str, ...], **changes: Any) -> Case:
    return Case("InferenceService/Embed", {**EMBED, **changes}, fields=fields)


def sample(name: str, value: Any) -> Case:
    return ask((f"parameters.{name}",), parameters={name: value})


def missing(method: str, **request: Any) -> Case:
    return Case(method, request, "NOT_FOUND")


CASES = [
    # What is not there.
    missing("ModelService/GetModel", model_id=NO_MODEL), missing("ModelService/DeleteModel", model_id=NO_MODEL),
    missing("ModelService/UpdateModel", model_id=NO_MODEL, display_name="x"),
    missing("ModelService/AddDocuments", model_id=NO_MODEL, documents=[{"text": "x"}]),
    missing("ModelService/ListDocuments", model_id=NO_MODEL), missing("ModelService/GetDocument", model_id=NO_MODEL, document_id="doc_x"),
    missing("TrainingService/GetTrainingJob", job_id=NO_JOB), missing("TrainingService/CancelTrainingJob", job_id=NO_JOB),
    missing("TrainingService/PauseTrainingJob", job_id=NO_JOB), missing("TrainingService/ResumeTrainingJob", job_id=NO_JOB),
    missing("TrainingService/RetryTrainingJob", job_id=NO_JOB), missing("TrainingService/ListTrainingJobAttempts", job_id=NO_JOB),
    missing("TrainingService/ListTrainingJobEvents", job_id=NO_JOB), missing("TrainingService/ListCheckpoints", job_id=NO_JOB),
    missing("TrainingService/WatchTrainingJob", job_id=NO_JOB), missing("TrainingService/GetTrainingMetrics", job_id=NO_JOB),
    missing("TrainingService/GetDataset", dataset_id=NO_DATASET), missing("TrainingService/DeleteDataset", dataset_id=NO_DATASET),
    missing("InferenceService/Generate", model_id=NO_MODEL, messages=[USER]),
    missing("InferenceService/StreamGenerate", model_id="nix", messages=[USER]),
    missing("InferenceService/RagGenerate", model_id=NO_MODEL, query="x"),
    missing("InferenceService/StreamRagGenerate", model_id=NO_MODEL, query="x"),
    missing("InferenceService/Retrieve", model_id=NO_MODEL, query="x"),
    tune(("dataset_id",), inline_records=[], dataset_id=NO_DATASET), tune(("base_model",), base_model="no-such-model"),
    tune(("model_id",), model_id=NO_MODEL),
    rag(("embedding_model",), embedding_model="no-such-model"), rag(("generator_model_id",), generator_model_id=NO_MODEL),
    missing("InferenceService/EvaluateRetrieval", model_id=NO_MODEL, queries=[{"query": "x", "relevant": [{"quote": "x"}]}]),
    Case("InferenceService/EvaluateRetrieval", {"model_id": NO_MODEL, "queries": [{"query": ""}], "k_values": [0], "timeout_seconds": -1,
         "configurations": [{"retrieval": {"similarity_threshold": 2, "top_k": 10**6}}]},
         fields=("queries[0].query", "queries[0].relevant", "k_values[0]", "timeout_seconds",
                 "configurations[0].retrieval.similarity_threshold", "configurations[0].retrieval.top_k")),
    # Versions.
    missing("ModelService/ListModelVersions", model_id=NO_MODEL), missing("ModelService/GetModelVersion", model_id=NO_MODEL, version=1),
    missing("ModelService/GetModelVersion", model_id="mdl_%2e%2e", version=-1),
    missing("ModelService/PromoteModelVersion", model_id=NO_MODEL, version=1),
    missing("ModelService/DeleteModelVersion", model_id=NO_MODEL, version=0),
    missing("ModelService/ExportModelVersion", model_id=NO_MODEL, version=1),
    missing("ModelService/ListModelFiles", model_id=NO_MODEL, version=2**31 - 1),
    missing("ModelService/DownloadModelFile", model_id=NO_MODEL, version=1, path="config.json"),
    missing("ModelService/DownloadModelFile", model_id=NO_MODEL, version=1, path="a/.../b c%2fd+é"),
    missing("ModelService/DownloadModelArchive", model_id=NO_MODEL, version=1),
    Case("ModelService/ListModelVersions", {"model_id": NO_MODEL, "page_size": 0}, fields=("page_size",)),
    Case("ModelService/ListModelVersions", {"model_id": NO_MODEL, "page_token": "WyJ4Il0"}, fields=("page_token",)),
    Case("ModelService/ExportModelVersion", {"model_id": NO_MODEL, "version": 1, "format": 9}, fields=("format",)),
    Case("ModelService/ExportModelVersion", {"model_id": NO_MODEL, "version": 1, "request_id": "r" * 200}, fields=("request_id",)),
    tune(("warm_start_from.model_id",), warm_start_from={"model_id": NO_MODEL}),
    tune(("warm_start_from.model_id",), warm_start_from={"version": 1}),
    # Ids that try to be paths.
    missing("ModelService/GetModel", model_id="mdl_%2e%2e"), missing("ModelService/GetModel", model_id="..."),
    missing("ModelService/GetModel", model_id="mdl_x:typo"),
    missing("TrainingService/GetTrainingJob", job_id="job_' OR 1=1 --"), missing("ModelService/GetModel", model_id="mdl_é\u202e"),
    tune(("base_model",), base_model="/etc"), tune(("base_model",), base_model="../../etc/passwd"),
    tune(("base_model",), base_model="a/../b"),
    missing("InferenceService/Generate", model_id="/etc/passwd", messages=[USER]),
    missing("InferenceService/Generate", model_id="../x", messages=[USER]),
    # Numbers.
    number("learning_rate", "NaN"), number("learning_rate", "Infinity"), number("learning_rate", -1), number("learning_rate", 0),
    number("epochs", 1e9), number("epochs", -1), number("batch_size", 0), number("batch_size", 2**31 - 1), number("max_steps", -5),
    number("max_sequence_tokens", 1), number("seed", -1), number("warmup_ratio", 2), number("weight_decay", "NaN"),
    tune(("eval_fraction",), eval_fraction=0.9), tune(("lora.rank",), lora={"rank": 0}), tune(("lora.alpha",), lora={"alpha": "NaN"}),
    rag(("retrieval.top_k",), retrieval={"top_k": 0}), rag(("retrieval.similarity_threshold",), retrieval={"similarity_threshold": 2}),
    rag(("chunking.max_tokens",), chunking={"max_tokens": 10**6}), rag(("chunking.overlap_tokens",), chunking={"overlap_tokens": -1}),
    sample("max_tokens", 10**9), sample("max_tokens", 0), sample("temperature", -1), sample("temperature", "NaN"), sample("top_p", 1.5),
    sample("top_k", -1), sample("repetition_penalty", 0), sample("logprobs", 10**6), ask(("version",), version=-1),
    Case("InferenceService/RenderPrompt", {**ASK, "max_tokens": 0}, fields=("max_tokens",)),
    Case("TrainingService/ListTrainingJobs", {"page_size": 10**6}, fields=("page_size",)),
    Case("ModelService/ListModels", {"page_token": "rubbish"}, fields=("page_token",)),
    Case("TrainingService/ListTrainingJobAttempts", {"job_id": NO_JOB, "page_size": 0}, fields=("page_size",)),
    Case("TrainingService/ListTrainingJobAttempts", {"job_id": NO_JOB, "page_token": "rubbish"}, fields=("page_token",)),
    Case("TrainingService/ListTrainingJobEvents", {"job_id": NO_JOB, "after_sequence": -1, "page_size": 10**6},
         fields=("after_sequence", "page_size")),
    Case("TrainingService/WatchTrainingJob", {"job_id": NO_JOB, "after_sequence": -1}, fields=("after_sequence",)),
    # Messages and texts.
    ask(("messages",), messages=[]), ask(("messages[0].content",), messages=[{"role": "user", "content": ""}]),
    ask(("messages[0].role",), messages=[{"role": "robot", "content": "x"}]), ask(("messages[1].role",), messages=[USER, USER]),
    ask(("messages",), messages=[USER], prompt="x"), ask(("prompt",), messages=[], prompt=""),
    Case("InferenceService/RagGenerate", {"model_id": NO_MODEL, "query": ""}, fields=("query",)),
    tune(("inline_records[0]",), inline_records=[{"messages": [USER]}]), tune(("inline_records[0]",), inline_records=[{"prompt": "x"}]),
    rag(("prompt_template",), prompt_template="{unknown} {question} {context}"),
    rag(("prompt_template",), prompt_template="{question} {context} {{ 'x' * 999999999 }}"),
    rag(("prompt_template",), prompt_template="{question} {context} {% for x in range(999999999) %}x{% endfor %}"),
    rag(("documents[0].text",), documents=[{"text": " "}]),
    # Texts to embed.
    Case("InferenceService/Embed", {}, fields=("embedding_model", "texts", "role")),
    embed(("role",), role=9), embed(("texts[1]",), texts=["x", " "]), embed(("texts[0]",), texts=["x" * 100_001]),
    embed(("texts",), texts=["x"] * 257), embed(("texts",), texts=["x" * 100_000] * 11),
    missing("InferenceService/Embed", embedding_model="no-such-model", texts=["x"], role="ROLE_QUERY"),
    Case("InferenceService/Embed", {**EMBED, "embedding_model": "aubmindlab/bert-base-arabertv2"}, "FAILED_PRECONDITION"),
    # Reranking.
    rag(("retrieval.rerank.model",), retrieval={"rerank": {"model": "/etc"}}),
    rag(("retrieval.rerank.model",), retrieval={"rerank": {"model": MINILM}}),
    rag(("retrieval.rerank.candidates", "retrieval.rerank.timeout_seconds"),
        retrieval={"rerank": {"candidates": 10**6, "timeout_seconds": "NaN"}}),
    # Everything at once.
    tune(("display_name", "base_model", "dataset_id", "parameters.epochs", "parameters.learning_rate", "lora.rank"),
         display_name="", base_model="nix", inline_records=[], dataset_id="ds_x",
         parameters={"epochs": 1e9, "learning_rate": "NaN"}, lora={"rank": -1}),
    ask(("model_id", "messages[0].content", "parameters.temperature", "parameters.max_tokens"),
        model_id="", messages=[{"role": "user", "content": ""}], parameters={"temperature": -1, "max_tokens": 10**9}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input_gets_the_same_clear_error_through_rest_and_grpc(stack: Stack, case: Case) -> None:
    by_grpc = call_grpc(stack.grpc_target, case.method, case.request)
    by_rest = call_rest(stack.url, case.method, case.request)
    assert isinstance(by_grpc, Refusal), by_grpc
    assert by_rest == by_grpc
    assert by_grpc.code == case.code, by_grpc
    assert by_grpc.reason.isupper(), by_grpc
    assert by_grpc.fields == set(case.fields), by_grpc
    for refusal in (by_grpc, by_rest):
        echoed = refusal.raw.replace("/etc/passwd", "").replace("/etc", "")
        assert not LEAK.search(echoed), refusal.raw


@pytest.mark.parametrize("body", ["{", "nonsense", '{"display_name": }', "[]"])
def test_a_body_that_is_no_json_object_is_refused(stack: Stack, body: str) -> None:
    path = "/api/v1/model-training/models/fine-tune"
    response = httpx.post(stack.url + path, content=body, headers={"content-type": "application/json"})
    assert refusal_from_rest(response).code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("path", ["/models/..%2f..%2fetc", "/models/mdl_x%00", "/training-jobs/%2e%2e%2f"])
def test_an_escaped_path_is_refused_at_the_gate(stack: Stack, path: str) -> None:
    response = httpx.get(f"{stack.url}/api/v1/model-training{path}")
    assert response.status_code in (400, 404)
    assert not LEAK.search(response.text)


def test_a_prompt_longer_than_the_context_is_refused_with_the_figures(stack: Stack) -> None:
    request = {**ASK, "messages": [{"role": "user", "content": "word " * 20_000}]}
    by_grpc = call_grpc(stack.grpc_target, "InferenceService/Generate", request)
    by_rest = call_rest(stack.url, "InferenceService/StreamGenerate", request)
    assert isinstance(by_grpc, Refusal)
    assert by_rest == by_grpc
    assert by_grpc.code == "INVALID_ARGUMENT"
    assert "8192" in by_grpc.message.replace(",", "")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_evil.py"])
def test_a_model_directory_with_pickled_weights_or_code_is_refused(stack: Stack, name: str) -> None:
    directory = stack.make_unsafe_model(name)
    by_grpc = call_grpc(stack.grpc_target, "ModelService/CreateFineTunedModel", {**TUNE, "base_model": directory})
    assert isinstance(by_grpc, Refusal)
    assert by_grpc == call_rest(stack.url, "ModelService/CreateFineTunedModel", {**TUNE, "base_model": directory})
    assert (by_grpc.code, set(by_grpc.fields)) == ("INVALID_ARGUMENT", {"base_model"})
