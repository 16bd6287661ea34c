"""The whole stack over a real vLLM, a server elsewhere or its own: a model is fine-tuned by us and answers there, as an adapter."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.basemodels.sources import BaseModelSource
from tests.e2e.stack import Stack
from tests.e2e.test_batch_generation import create_batch, download, upload
from tests.inference.vllm_server import VARIABLES, VLLM_PYTHON, start_vllm_server
from tests.integration.jobs import TrainingJobs

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION, ANSWER = "Who keeps the lamp of Orvale?", "Mira Tolsen keeps it."
RECORDS = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}] * 5
SECONDS = 240


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Where the stack keeps all that is its own; its base model lies there already."""
    with tempfile.TemporaryDirectory(prefix="stack-") as made:
        yield Path(made)


def post(stack: Stack, path: str, body: Any) -> httpx.Response:
    return httpx.post(stack.api + path, json=body, timeout=SECONDS)


def ask(stack: Stack, model_id: str, question: str, **more: Any) -> Any:
    body = {"model_id": model_id, "messages": [{"role": "user", "content": question}]}
    answer = post(stack, "/inference", {**body, "parameters": {"temperature": 0, "max_tokens": 24, **more}})
    assert answer.is_success, answer.text
    return answer.json()


def fine_tune(stack: Stack) -> str:
    """Teach SmolLM2 one fact; give the model's id."""
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    uploaded = httpx.post(f"{stack.api}/datasets?display_name=lamp", content=lines.encode(), timeout=60).json()
    body = {"display_name": "Lamp", "base_model": BASE, "dataset_id": uploaded["dataset_id"], "parameters": {"max_steps": 8}}
    created = post(stack, "/models/fine-tune", body).json()
    url = f"{stack.api}/training-jobs/{created['training_job']['job_id']}/watch"
    with httpx.stream("GET", url, timeout=SECONDS) as events:
        assert "SUCCEEDED" in "".join(events.iter_text())
    return str(created["model"]["model_id"])


def check_answers(stack: Stack) -> str:
    """See the base and a model that was tuned on it answer each for itself; give the tuned one's id."""
    assert "Paris" in json.dumps(ask(stack, BASE, "What is the capital of France?"))
    tuned = fine_tune(stack)
    assert ANSWER in json.dumps(ask(stack, tuned, QUESTION))
    assert ANSWER not in json.dumps(ask(stack, BASE, QUESTION)), "the base answers for itself beside it"
    embedded = post(stack, "/embeddings", {"embedding_model": "all-minilm-l6-v2", "texts": ["a lamp"], "role": "ROLE_QUERY"})
    assert embedded.json()["dimension"] == 384, "embedding stays here"
    check_batch(stack, tuned)
    return tuned


def check_batch(stack: Stack, tuned: str) -> None:
    """See a dataset answered as a job, by the tuned model; a prompt over the context fails alone."""
    too_long = {"messages": [{"role": "user", "content": "lamp " * 2000}]}
    dataset = upload(stack, [*RECORDS, too_long, *RECORDS], record_kind="RECORD_KIND_PROMPT")
    parameters = {"max_tokens": 24, "temperature": 0}
    job_id = create_batch(stack, dataset["dataset_id"], tuned, parameters=parameters).json()["job_id"]
    TrainingJobs(stack).wait_for_state(job_id, "STATE_SUCCEEDED")
    lines = download(stack, job_id)
    assert [line["error"] and line["error"]["reason"] for line in lines] == [None] * 5 + ["PROMPT_TOO_LONG"] + [None] * 5
    assert {line["choices"][0]["text"] for line in lines if not line["error"]} == {ANSWER}


@pytest.mark.timeout(900)
def test_a_model_that_was_fine_tuned_here_answers_there(directory: Path) -> None:
    stack_path, cache = directory / "stack", directory / "stack" / "models-cached"
    stack_path.mkdir()
    base = BaseModelSource(cache).resolve(BASE).directory
    with start_vllm_server(base, BASE, directory / "vllm.log", "--enforce-eager", "--max-model-len", "1024") as url:
        stack = Stack(stack_path, {"ENGINE": url})
        try:
            stack.wait_ready()
            tuned = check_answers(stack)
            models = httpx.get(f"{url}/v1/models", timeout=10).json()["data"]
            assert [model["parent"] for model in models] == [None, BASE]
            httpx.delete(f"{stack.api}/models/{tuned}", timeout=60).raise_for_status()
            assert len(httpx.get(f"{url}/v1/models", timeout=10).json()["data"]) == 1
        except BaseException:
            stack.process.kill()
            raise
    try:
        down = post(stack, "/inference", {"model_id": BASE, "prompt": "The river"})
        assert (down.status_code, "ENGINE_UNAVAILABLE" in down.text) == (503, True), down.text
    finally:
        stack.stop()


@pytest.mark.timeout(900)
def test_a_vllm_of_our_own_is_started_answers_dies_and_answers_again() -> None:
    arguments = "--enforce-eager --max-model-len 1024"
    with tempfile.TemporaryDirectory(prefix="stack-") as made:
        stack = Stack(Path(made), {"ENGINE": "vllm", "VLLM_PYTHON": VLLM_PYTHON or "", "VLLM_ARGUMENTS": arguments, **VARIABLES})
        try:
            stack.wait_ready()
            tuned = check_answers(stack)
            [server] = [process for process in stack.list_processes() if "vllm.entrypoints.openai.api_server" in process.cmdline()]
            server.kill()
            stack.wait_until(lambda: post(stack, "/inference", {"model_id": BASE, "prompt": "The river"}).status_code == 503)
            stack.wait_until(lambda: post(stack, "/inference", {"model_id": BASE, "prompt": "The river"}).is_success, SECONDS)
            assert ANSWER in json.dumps(ask(stack, tuned, QUESTION)), "its adapter was given to the new one"
        finally:
            stack.stop()
