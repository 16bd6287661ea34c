"""Files as documents, as a user gives them by REST: from the upload to what is found, and what becomes of bad ones."""

import json
from typing import Any

import httpx
import pytest

from tests.e2e.stack import Stack
from tests.e2e.test_main_job import BASE, MINILM, get, post, stream
from tests.rag.parsing.drawn_pdfs import draw_pdf

PAGES = (
    ["The ferry Halda leaves Orvale at seven and comes back at nine.", "Dogs travel on the aft deck, on a lead, all the year."],
    ["Bicycles need a ticket of their own on all of the boats.", "It costs two crowns, and three with a child's seat."],
)


def upload(stack: Stack, model_id: str, content: bytes, **query: str) -> httpx.Response:
    return httpx.post(f"{stack.api}/models/{model_id}/documents", params=query, content=content, timeout=120)


def wait_for_job(stack: Stack, job_id: str) -> list[dict[str, Any]]:
    return list(stream(stack, "GET", f"/training-jobs/{job_id}/watch"))


def read_document(stack: Stack, document: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = get(stack, f"/models/{document['model_id']}/documents/{document['document_id']}")
    return read


def retrieve(stack: Stack, model_id: str, query: str, top_k: int = 1) -> list[dict[str, Any]]:
    body = {"model_id": model_id, "query": query, "retrieval": {"top_k": top_k, "similarity_threshold": -1}}
    chunks: list[dict[str, Any]] = post(stack, "/rag/retrieve", body)["chunks"]
    return chunks


@pytest.fixture(scope="module")
def library(stack: Stack) -> str:
    """A RAG model without documents."""
    body = {"display_name": "Files", "generator_model_id": BASE, "embedding_model": MINILM, "chunking": {"max_tokens": 24}}
    created = post(stack, "/models/rag", body)
    wait_for_job(stack, created["training_job"]["job_id"])
    return str(created["model"]["model_id"])


def test_an_uploaded_pdf_is_found_with_its_page_and_place(stack: Stack, library: str) -> None:
    pdf = draw_pdf(*([list(line) for line in page] for page in PAGES))
    answer = upload(stack, library, pdf, title="Halda", source_uri="https://example.org/halda.pdf", metadata=json.dumps({"year": 2026}))
    assert answer.is_success, answer.text
    document = answer.json()
    assert (document["state"], document["title"], document["original_size_bytes"]) == ("STATE_PENDING", "Halda", len(pdf))
    events = wait_for_job(stack, document["job_id"])
    assert events[-1]["finished"]["job"]["state"] == "STATE_SUCCEEDED"
    read = read_document(stack, document)
    assert (read["state"], read["format"], read["page_count"], read["metadata"]) == ("STATE_INDEXED", "FORMAT_PDF", 2, {"year": 2026})
    (chunk,) = retrieve(stack, library, "What do bicycles cost?")
    assert (chunk["document_id"], chunk["page"], chunk["title"]) == (document["document_id"], 2, "Halda")
    assert "Bicycles" in chunk["text"]
