"""Files as documents, as a user gives them by REST: from the upload to what is found, and what becomes of bad ones."""

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fpdf import FPDF
from PIL import Image

from tests.e2e.stack import Stack
from tests.e2e.test_main_job import BASE, MINILM, get, post, stream
from tests.rag.parsing.drawn_pdfs import draw_pdf
from tests.rag.parsing.test_isolation import BAD

PAGES = (
    ["The ferry Halda leaves Orvale at seven and comes back at nine.", "Dogs travel on the aft deck, on a lead, all the year."],
    ["Bicycles need a ticket of their own on all of the boats.", "It costs two crowns, and three with a child's seat."],
)


def draw_image_pdf() -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "black").save(image, "PNG")
    pdf = FPDF()
    pdf.add_page()
    pdf.image(image, 10, 10, 50)
    return bytes(pdf.output())


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
    body = {
        "display_name": "Files",
        "generator_model_id": BASE,
        "embedding_model": MINILM,
        "chunking": {"max_tokens": 24, "overlap_tokens": 0},
    }
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
    path = f"{stack.api}/models/{library}/documents/{document['document_id']}"
    text, content = httpx.get(f"{path}/text", timeout=30), httpx.get(f"{path}/content", timeout=30)
    assert text.text[chunk["char_start"] : chunk["char_end"]] == chunk["text"]
    assert text.headers["content-type"] == "text/plain; charset=utf-8"
    assert (content.content, content.headers["content-type"]) == (pdf, "application/pdf")
    counters = events[-1]["finished"]["job"]["progress"]["indexing"]
    chunks = read["chunk_count"]
    assert counters == {
        "parsed_documents": 1, "chunked_chunks": chunks, "embedded_chunks": chunks, "reused_chunks": 0, "committed_documents": 1
    }  # fmt: skip


def test_an_imported_file_is_found(stack: Stack, library: str) -> None:
    page = stack.imports_path / "quay.html"
    page.write_text("<html><head><title>Quays</title></head><body><h1>North quay</h1><p>Eels are smoked here.</p></body></html>")
    document = post(stack, f"/models/{library}/documents/import", {"uri": f"file://{page}", "metadata": {"kind": "web"}})
    wait_for_job(stack, document["job_id"])
    (chunk,) = retrieve(stack, library, "Where are eels smoked?")
    assert (chunk["title"], chunk["heading_path"], chunk["metadata"]) == ("Quays", ["North quay"], {"kind": "web"})


def test_a_file_in_its_place_embeds_only_what_has_changed(stack: Stack, library: str) -> None:
    sections = {"Lamps": "The lamp of Orvale burns rapeseed oil in all weathers.", "Nets": "Nets dry on the north quay every Sunday."}
    source = {"source_uri": "https://example.org/guide.md"}

    def write() -> bytes:
        return "\n\n".join(
            f"# Guide\n\n## {name}\n\n{text}" if name == "Lamps" else f"## {name}\n\n{text}" for name, text in sections.items()
        ).encode()

    first = upload(stack, library, write(), **source).json()
    wait_for_job(stack, first["job_id"])
    (lamp,), (nets,) = (retrieve(stack, library, query) for query in ("What does the lamp burn?", "Where do nets dry?"))
    assert (lamp["title"], lamp["heading_path"]) == ("Guide", ["Guide", "Lamps"])
    again = upload(stack, library, write(), **source).json()
    assert (again["document_id"], again["state"], again["job_id"]) == (first["document_id"], "STATE_INDEXED", first["job_id"])
    sections["Nets"] = "Nets dry on the south quay since the storm."
    changed = upload(stack, library, write(), **source).json()
    assert (changed["document_id"], changed["state"], changed["update_pending"]) == (first["document_id"], "STATE_INDEXED", True)
    job = wait_for_job(stack, changed["job_id"])[-1]["finished"]["job"]
    assert job["state"] == "STATE_SUCCEEDED"
    assert (job["progress"]["indexing"]["reused_chunks"], job["progress"]["indexing"]["embedded_chunks"]) == (1, 2)
    (same,), (other,) = (retrieve(stack, library, query) for query in ("What does the lamp burn?", "Where do nets dry?"))
    assert (same["chunk_id"], same["scores"]) == (lamp["chunk_id"], lamp["scores"])
    assert "south quay" in other["text"]
    assert other["chunk_id"] != nets["chunk_id"]
    assert read_document(stack, changed)["update_pending"] is False


# Each named cause through the whole way; finer cases: tests/rag/parsing.
TROUBLES = {
    "an encrypted PDF": "DOCUMENT_ENCRYPTED",
    "a truncated PDF": "DOCUMENT_TRUNCATED",
    "a blank PDF": "DOCUMENT_EMPTY",
    "a ZIP bomb": "DOCUMENT_ARCHIVE_BOMB",
    "an entity bomb": "DOCUMENT_XML_ENTITIES",
    "a link in an archive": "DOCUMENT_ARCHIVE_UNSAFE",
    "an old DOC": "DOCUMENT_UNSUPPORTED_FORMAT",
}
MORE_TROUBLES = {
    "an image-only PDF": (draw_image_pdf(), "DOCUMENT_IMAGE_ONLY"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "DOCUMENT_UNSUPPORTED_FORMAT"),
    "a word without end": (b"Read this: " + b"x" * 100_000, "DOCUMENT_WORD_TOO_LONG"),
    "NULs": (b"some\x00text, and more of it than that", "DOCUMENT_BAD_CHARACTERS"),
    "a lone surrogate": (b"half \xed\xa0\x80 a pair", "DOCUMENT_BAD_CHARACTERS"),
}


def test_bad_files_fail_alone_each_with_its_reason(stack: Stack, library: str) -> None:
    bad = {name: (BAD[name][0], reason) for name, reason in TROUBLES.items()} | MORE_TROUBLES
    good = upload(stack, library, b"The good one is about quinces.", title="good").json()
    given = {name: upload(stack, library, content, title=name).json() for name, (content, _) in bad.items()}
    for job_id in {document["job_id"] for document in (good, *given.values())}:
        wait_for_job(stack, job_id)
    for name, document in given.items():
        read = read_document(stack, document)
        assert read["state"] == "STATE_FAILED", name
        assert (read["error"]["details"][0]["reason"], read["chunk_count"]) == (bad[name][1], 0), name
        assert str(stack.storage_path) not in json.dumps(read)
    assert read_document(stack, good)["state"] == "STATE_INDEXED"
    assert retrieve(stack, library, "quinces")[0]["title"] == "good"
    # Nothing is kept of what cannot be read.
    kept = list((stack.storage_path / "default" / "documents" / library).iterdir())
    listed = get(stack, f"/models/{library}/documents?state=STATE_INDEXED")["documents"]
    assert len(kept) == len(listed)


def test_a_failed_file_leaves_the_one_before_in_its_place(stack: Stack, library: str) -> None:
    source = {"source_uri": "https://example.org/pears"}
    first = upload(stack, library, b"Pears ripen in the cellar of the old customs house.", **source).json()
    wait_for_job(stack, first["job_id"])
    job = wait_for_job(stack, upload(stack, library, BAD["an encrypted PDF"][0], **source).json()["job_id"])[-1]["finished"]["job"]
    assert (job["state"], job["state_reason"]) == ("STATE_FAILED", "DOCUMENTS_INVALID")
    read = read_document(stack, first)
    assert (read["state"], read["error"]["details"][0]["reason"]) == ("STATE_INDEXED", "DOCUMENT_ENCRYPTED")
    assert "cellar" in retrieve(stack, library, "Where do pears ripen?")[0]["text"]


def test_a_file_above_the_limit_is_refused_and_leaves_nothing(stack: Stack, library: str) -> None:
    before = sorted(stack.storage_path.rglob("*"))

    def send() -> Iterator[bytes]:
        for _ in range(300):
            yield bytes(1 << 20)

    try:
        answer = httpx.post(f"{stack.api}/models/{library}/documents", content=send(), timeout=120)
    except httpx.WriteError:
        pass  # the connection was closed while this still wrote
    else:
        assert answer.status_code == 429, answer.text
        assert answer.json()["details"][0]["reason"] == "UPLOAD_TOO_LARGE"
    assert sorted(stack.storage_path.rglob("*")) == before
