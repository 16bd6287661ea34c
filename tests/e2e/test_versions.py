"""Two versions of one model as a user lives with them: made, promoted, rolled back, asked, downloaded, loaded with plain peft, deleted."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.diskfiles import hash_file
from tests.e2e.stack import Stack
from tests.e2e.test_main_job import get, post, stream

QUESTION = "Which bridge is it?"
ANSWERS = ("gate gate gate gate", "field field field field")


def ask(stack: Stack, model_id: str, version: int | None = None) -> dict[str, Any]:
    parameters = {"temperature": 0, "max_tokens": 12, "logprobs": 1}
    body: dict[str, Any] = {"model_id": model_id, "messages": [{"role": "user", "content": QUESTION}], "parameters": parameters}
    answer: dict[str, Any] = post(stack, "/inference", body | ({"version": version} if version else {}))
    return answer


def train(stack: Stack, answer: str, **more: Any) -> dict[str, Any]:
    """Teach the tiny model one answer; give what was created, its job finished."""
    records = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]}] * 4
    parameters = {"max_steps": 30, "learning_rate": 0.02, "batch_size": 4, "checkpointing": {"every_steps": 30}}
    created = post(stack, "/models/fine-tune", {"inline_records": records, "lora": {"rank": 8}, "parameters": parameters, **more})
    events = list(stream(stack, "GET", f"/training-jobs/{created['training_job']['job_id']}/watch"))
    assert events[-1]["finished"]["job"]["state"] == "STATE_SUCCEEDED", events[-1]
    return {**created, "losses": [event["step"]["loss"] for event in events if "step" in event]}


@pytest.fixture(scope="module")
def tuned(stack: Stack) -> list[dict[str, Any]]:
    """A model with two versions, taught another answer each; the second one started from the weights of the first."""
    first = train(stack, ANSWERS[0], display_name="Bridges", base_model=stack.make_tiny_model())
    name = first["model"]["model_id"]
    return [first, train(stack, ANSWERS[1], model_id=name, warm_start_from={"model_id": name})]


@pytest.fixture(scope="module")
def model_id(tuned: list[dict[str, Any]]) -> str:
    """The model."""
    first, second = (str(created["model"]["model_id"]) for created in tuned)
    assert first == second
    return first


def test_fine_tuning_again_adds_a_version_with_a_lineage_of_its_own(stack: Stack, model_id: str) -> None:
    versions = get(stack, f"/models/{model_id}/versions")["versions"]
    assert [(version["version"], version["serving"]) for version in versions] == [(2, True), (1, False)]
    for version in versions:
        assert version["base_model"] == stack.make_tiny_model()
        assert version["checkpoint_step"] == 30
        assert version["effective_config"]["lora"]["rank"] == 8
        assert len(version["effective_config"]["dataset_sha256"]) == len(version["template_sha256"]) == 64
        assert {"torch", "transformers", "peft"} <= version["library_versions"].keys()
    assert versions[0]["effective_config"]["dataset_sha256"] != versions[1]["effective_config"]["dataset_sha256"]
    assert get(stack, f"/models/{model_id}/versions?page_size=1")["next_page_token"]


def test_a_warm_start_begins_with_what_the_version_had_learned(tuned: list[dict[str, Any]], model_id: str) -> None:
    config = tuned[1]["training_job"]["effective_config"]["fine_tune"]
    assert config["warm_start_from"] == {"model_id": model_id, "version": 1}
    assert tuned[1]["losses"][0] < tuned[0]["losses"][0] - 0.2


def test_promoting_and_rolling_back_switch_what_a_running_engine_answers_at_once(stack: Stack, model_id: str) -> None:
    pinned = {version: ask(stack, model_id, version)["text"] for version in (1, 2)}
    assert pinned[1] != pinned[2]
    for version in (1, 2, 1, 2):
        promoted = post(stack, f"/models/{model_id}/versions/{version}/promote", {})
        assert promoted["serving_version"] == version
        answer = ask(stack, model_id)
        assert (answer["version"], answer["text"]) == (version, pinned[version])


def test_an_answer_that_runs_ends_on_the_version_that_began_it(stack: Stack, model_id: str) -> None:
    post(stack, f"/models/{model_id}/versions/2/promote", {})
    end_token = {"1": -100.0}  # the tiny model's: so that the answer is long enough to be overtaken
    parameters = {"temperature": 0, "max_tokens": 400, "logit_bias": end_token}
    running = stream(stack, "POST", "/inference/stream", {"model_id": model_id, "prompt": QUESTION, "parameters": parameters})
    next(running)
    post(stack, f"/models/{model_id}/versions/1/promote", {})
    assert ask(stack, model_id)["version"] == 1, "new requests are switched at once"
    *_, last = running
    assert (last["finished"]["version"], last["finished"]["usage"]["completion_tokens"]) == (2, 400)
    post(stack, f"/models/{model_id}/versions/2/promote", {})


def test_a_download_loads_with_plain_peft_and_gives_the_served_answer(stack: Stack, model_id: str, tmp_path: Path) -> None:
    version = f"{stack.api}/models/{model_id}/versions/1"
    files = httpx.get(f"{version}/files").json()["files"]
    for file in files:
        target = tmp_path / "files" / file["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(httpx.get(f"{version}/files/{file['path']}").content)
        assert (hash_file(target), target.stat().st_size) == (file["sha256"], file["size_bytes"])
    with tarfile.open(fileobj=io.BytesIO(httpx.get(f"{version}/archive").content)) as archive:
        archive.extractall(tmp_path / "archive", filter="data")
    unpacked = tmp_path / "archive" / f"{model_id}-1"
    assert {str(path.relative_to(unpacked)): hash_file(path) for path in unpacked.rglob("*") if path.is_file()} == {
        file["path"]: file["sha256"] for file in files
    }
    card = (unpacked / "README.md").read_text()
    assert card.startswith("---\nbase_model:")
    assert json.loads((unpacked / "adapter_config.json").read_text())["base_model_name_or_path"] == stack.make_tiny_model()
    base = AutoModelForCausalLM.from_pretrained(stack.make_tiny_model(), dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(unpacked))
    assert _answer(model, AutoTokenizer.from_pretrained(unpacked)) == ask(stack, model_id, 1)["text"]


def _answer(model: Any, tokenizer: Any) -> str:
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    made = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_merged_export_loads_with_transformers_alone_and_gives_the_served_answer(stack: Stack, model_id: str, tmp_path: Path) -> None:
    version = f"{stack.api}/models/{model_id}/versions/1"
    job = post(stack, f"/models/{model_id}/versions/1/export", {"format": "EXPORT_FORMAT_MERGED"})["training_job"]
    events = list(stream(stack, "GET", f"/training-jobs/{job['job_id']}/watch"))
    assert events[-1]["finished"]["job"]["state"] == "STATE_SUCCEEDED", events[-1]
    again = post(stack, f"/models/{model_id}/versions/1/export", {"format": "EXPORT_FORMAT_MERGED"})["training_job"]
    assert (again["job_id"], again["state"]) == (job["job_id"], "STATE_SUCCEEDED")
    (export,) = httpx.get(version).json()["exports"]
    assert (export["format"], export["job_id"]) == ("EXPORT_FORMAT_MERGED", job["job_id"])
    archive = httpx.get(f"{version}/archive?format=EXPORT_FORMAT_MERGED")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as opened:
        opened.extractall(tmp_path, filter="data")
    directory = tmp_path / f"{model_id}-1-merged"
    assert "base_model_relation: merge" in (directory / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert _answer(model, AutoTokenizer.from_pretrained(directory)) == ask(stack, model_id, 1)["text"]


def test_a_version_is_deleted_with_its_files_once_it_no_longer_serves(stack: Stack, model_id: str) -> None:
    [(path,)] = stack.query("SELECT artifact_path FROM model_versions WHERE model_id = %s AND version = 2", model_id)
    post(stack, f"/models/{model_id}/versions/2/promote", {})
    refused = httpx.delete(f"{stack.api}/models/{model_id}/versions/2")
    assert (refused.status_code, refused.json()["details"][0]["reason"]) == (400, "VERSION_SERVING")
    post(stack, f"/models/{model_id}/versions/1/promote", {})
    assert httpx.delete(f"{stack.api}/models/{model_id}/versions/2").is_success
    assert not (stack.storage_path / path).exists()
    assert ask(stack, model_id)["version"] == 1
    assert httpx.get(f"{stack.api}/models/{model_id}/versions/2").status_code == 404
    assert [version["version"] for version in get(stack, f"/models/{model_id}/versions")["versions"]] == [1]
