"""A RAG model's index is built anew through REST, with another embedding model, while documents come, change and go."""

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.stack import Stack
from tests.rag.tiny_encoders import build_tiny_xlm_roberta

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
DOCUMENTS = {
    "Lighthouse": "The lighthouse of Orvale was built in 1884 and lights the old harbour.",
    "Bakery": "Bread is baked before sunrise in the bakery near the bridge.",
    "Maps": "The keeper of the blue house keeps the maps of the river town.",
}


class _Library:
    """A RAG model behind REST."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.model_id = ""

    def call(self, verb: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = httpx.request(verb, self._stack.api + path, json=body, timeout=60)
        assert response.is_success, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def wait_for(self, job_id: str) -> dict[str, Any]:
        self._stack.wait_until(lambda: self.read_state(job_id) in ("STATE_SUCCEEDED", "STATE_FAILED", "STATE_CANCELLED"), 180)
        return self.call("GET", f"/training-jobs/{job_id}")

    def read_state(self, job_id: str) -> str:
        return str(self.call("GET", f"/training-jobs/{job_id}")["state"])

    def create(self, generator: str) -> None:
        documents = [{"title": title, "text": text} for title, text in DOCUMENTS.items()]
        made = self.call(
            "POST",
            "/models/rag",
            {"display_name": "Town", "generator_model_id": generator, "embedding_model": MINILM, "documents": documents},
        )
        self.model_id = made["model"]["model_id"]
        assert self.wait_for(made["training_job"]["job_id"])["state"] == "STATE_SUCCEEDED"

    def add(self, **document: str) -> str:
        added = self.call("POST", f"/models/{self.model_id}/documents/batch", {"documents": [document]})
        return str(added["training_job"]["job_id"])

    def read_index(self) -> dict[str, Any]:
        rag: dict[str, Any] = self.call("GET", f"/models/{self.model_id}")["rag"]
        index: dict[str, Any] = rag["index"]
        return rag | index

    def retrieve(self, **retrieval: object) -> httpx.Response:
        body = {"model_id": self.model_id, "query": "When was the lighthouse built?", "retrieval": {"top_k": 20, **retrieval}}
        return httpx.post(self._stack.api + "/rag/retrieve", json=body, timeout=60)

    def find(self, mode: str = "DENSE") -> dict[str, str]:
        """Give what is found of each document, by title: the tiny encoder reads little, and cuts the texts into pieces."""
        response = self.retrieve(search_mode=f"SEARCH_MODE_{mode}", similarity_threshold=-1)
        assert response.is_success, response.text
        found: dict[str, str] = {}
        for chunk in response.json()["chunks"]:
            found[chunk["title"]] = f"{found.get(chunk['title'], '')} {chunk['text']}"
        return found

    def list_documents(self) -> dict[str, str]:
        return {each["title"]: each["document_id"] for each in self.call("GET", f"/models/{self.model_id}/documents")["documents"]}


@pytest.mark.timeout(600)
def test_an_index_is_built_anew_while_documents_come_change_and_go(stack: Stack) -> None:
    stack.wait_ready()
    library = _Library(stack)
    library.create(stack.make_tiny_model())
    first = library.read_index()
    assert (first["index_number"], first["space"]["embedding_model"], first["space"]["dimension"]) == (1, MINILM, 384)
    assert len(first["fingerprint"]) == 32
    _check_percentile(library, first)

    encoder = build_tiny_xlm_roberta(stack.data_directory / "models" / "tiny-encoder")
    asked = {"embedding_model": str(encoder), "chunking": {"max_tokens": 32, "overlap_tokens": 4}}
    job_id = library.call("POST", f"/models/{library.model_id}/reindex", asked)["training_job"]["job_id"]
    refused = httpx.post(f"{stack.api}/models/{library.model_id}/reindex", json={}, timeout=60)
    assert (refused.status_code, refused.json()["details"][0]["reason"]) == (400, "REINDEX_RUNNING")
    known = library.list_documents()
    added = [
        library.add(title="Ferry", text="The ferry crosses the river every hour but on Fridays."),
        library.add(title="Bakery", text="The bakery near the bridge closed last winter.", document_id=known["Bakery"]),
    ]
    assert httpx.delete(f"{stack.api}/models/{library.model_id}/documents/{known['Maps']}", timeout=60).is_success
    # Killed while it works, the job goes on where it was.
    os.kill(stack.wait_for_role("index").pid, signal.SIGKILL)
    assert library.find()["Lighthouse"].strip() == DOCUMENTS["Lighthouse"]
    jobs = [library.wait_for(each) for each in (job_id, *added)]
    assert [job["state"] for job in jobs] == ["STATE_SUCCEEDED"] * 3
    assert jobs[0]["effective_config"]["rag_index"]["reindex"] is True

    second = library.read_index()
    assert (second["index_number"], second["embedding_model"], second["chunking"]["max_tokens"]) == (2, str(encoder), 32)
    assert (second["document_count"], second["space"]["dimension"]) == (3, 32)
    assert second["fingerprint"] != first["fingerprint"]
    for mode in ("DENSE", "HYBRID"):
        found = library.find(mode)
        assert found.keys() == {"Lighthouse", "Bakery", "Ferry"}
        assert "winter" in found["Bakery"]
        assert "sunrise" not in found["Bakery"]
    stack.wait_until(lambda: stack.query("SELECT count(*) FROM rag_indexes WHERE model_id = %s", library.model_id) == [(1,)], 60)
    assert stack.query("SELECT DISTINCT index_number FROM chunks WHERE model_id = %s", library.model_id) == [(2,)]
    _change_weights(stack, library, encoder, second)


def _check_percentile(library: _Library, index: dict[str, Any]) -> None:
    """A percentile is told with the similarity that it comes to."""
    points = {point["percent"]: point["similarity"] for point in index["calibration"]["percentiles"]}
    found = library.retrieve(search_mode="SEARCH_MODE_DENSE", similarity_percentile=90).json()["retrieval"]
    assert found["similarity_percentile"] == 90
    assert found["similarity_threshold"] == pytest.approx(points[90.0])


def _change_weights(stack: Stack, library: _Library, encoder: Path, index: dict[str, Any]) -> None:
    """An embedding model whose files change is not mixed with its index: queries are refused until the index is built anew."""
    weights = load_file(encoder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] += 1.0
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    os.kill(stack.wait_for_role("engine").pid, signal.SIGKILL)
    stack.wait_until(lambda: library.retrieve().status_code not in (200, 503), 120)
    refused = library.retrieve()
    assert (refused.status_code, refused.json()["details"][0]["reason"]) == (400, "EMBEDDING_SPACE_CHANGED")
    job_id = library.call("POST", f"/models/{library.model_id}/reindex", {})["training_job"]["job_id"]
    assert library.wait_for(job_id)["state"] == "STATE_SUCCEEDED"
    assert library.read_index()["fingerprint"] != index["fingerprint"]
    assert library.find().keys() == {"Lighthouse", "Bakery", "Ferry"}
