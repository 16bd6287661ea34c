"""The index job's child side: real documents in, events out, one per document; a bad one fails alone, a cancel stops it."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from server.domain.embeddings import EmbeddingBackend
from server.domain.errors import NotFound
from server.domain.events import ChildEvent, DocumentIndexed, Finalizing, ResultReady, SpaceFound, Started, Warned
from server.domain.generation import EmbedRole
from server.domain.jobs import FailureReason, JobFailure
from server.domain.orders import IndexOrder, StagedDocument
from server.domain.retrieval import Chunking
from server.domain.specs import IndexSpec
from server.rag.embedding import Embedder
from server.rag.index_child import MAX_EVENT_BYTES, run_index
from server.services.codec import CHILD_EVENT, Codec
from tests.rag.conftest import MINILM
from tests.rag.tiny_encoders import build_tiny_xlm_roberta

DOCUMENTS = Codec[StagedDocument](StagedDocument)
HALF_PRECISION = 1e-3
CHUNKING = Chunking(40, 8)


def never() -> bool:
    return False


def run(
    root: Path,
    texts: Sequence[str],
    embedder: Embedder,
    model: str = MINILM,
    chunking: Chunking = CHUNKING,
    should_stop: Callable[[], bool] = never,
    max_event_bytes: int = MAX_EVENT_BYTES,
    backend: EmbeddingBackend = EmbeddingBackend.FLOAT32,
) -> list[ChildEvent]:
    """Index texts named doc_0, doc_1, … and give the events as the worker would read them."""
    lines = [DOCUMENTS.encode(StagedDocument(f"doc_{place}", f"Title {place}", text)) for place, text in enumerate(texts)]
    (root / "documents.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    order = IndexOrder("job_1", 1, IndexSpec(model, chunking, embedding_backend=backend), "documents.jsonl", len(texts))
    events: list[ChildEvent] = []
    run_index(order, root, embedder, events.append, should_stop, fetch=root.joinpath, max_event_bytes=max_event_bytes)
    return [CHILD_EVENT.decode(CHILD_EVENT.encode(event)) for event in events]


def documents_of(events: Sequence[ChildEvent]) -> list[DocumentIndexed]:
    return [event for event in events if isinstance(event, DocumentIndexed)]


def read_vectors(event: DocumentIndexed) -> np.ndarray:
    return np.frombuffer(base64.b64decode(event.vectors), dtype="<f2").reshape(-1, event.dimension).astype(np.float32)


def test_real_documents_become_chunks_with_exact_places_and_their_vectors(tmp_path: Path, minilm: Embedder) -> None:
    paths = sorted((Path(__file__).parents[2] / "examples" / "documents").glob("*.md"))
    texts = [path.read_text("utf-8") for path in paths]
    events = run(tmp_path, texts, minilm)
    assert isinstance(events[0], SpaceFound)
    assert events[0].measured.space == minilm.load(MINILM).space
    assert isinstance(events[1], Started)
    assert events[1].total_steps == len(texts)
    indexed = documents_of(events)
    assert [event.document_id for event in indexed] == [f"doc_{place}" for place in range(len(texts))]
    for text, event in zip(texts, indexed, strict=True):
        assert event.error == ""
        assert [chunk.position for chunk in event.chunks] == list(range(len(event.chunks)))
        assert all(text[chunk.char_start : chunk.char_end] == chunk.text for chunk in event.chunks)
        assert all(0 < chunk.token_count <= 40 for chunk in event.chunks)
        expected = minilm.embed(MINILM, [chunk.text for chunk in event.chunks], EmbedRole.PASSAGE)
        assert np.abs(read_vectors(event) - expected).max() < HALF_PRECISION
    assert len({chunk.chunk_id for event in indexed for chunk in event.chunks}) == sum(len(event.chunks) for event in indexed)
    assert isinstance(events[-2], Finalizing)
    result = events[-1]
    assert isinstance(result, ResultReady)
    assert result.metrics["chunks"] == sum(len(event.chunks) for event in indexed)
    assert result.peak_memory_bytes > 100e6


def test_a_bad_document_fails_alone_with_its_reason(tmp_path: Path, minilm: Embedder) -> None:
    indexed = documents_of(run(tmp_path, ["Good one.", " \n ", "Has \x00 in it.", "Good two."], minilm))
    assert [event.document_id for event in indexed] == ["doc_0", "doc_1", "doc_2", "doc_3"]
    assert [bool(event.error) for event in indexed] == [False, True, True, False]
    assert "no text" in indexed[1].error
    assert "NUL" in indexed[2].error
    assert not indexed[2].chunks
    assert indexed[2].vectors == ""
    assert indexed[3].chunks[0].text == "Good two."


def test_a_document_too_long_for_one_event_is_refused_with_advice(tmp_path: Path) -> None:
    embedder = Embedder({"tiny": build_tiny_xlm_roberta(tmp_path / "tiny")}.__getitem__)
    events = run(tmp_path, ["map " * 5_000, "Short."], embedder, "tiny", max_event_bytes=20_000)
    indexed = documents_of(events)
    assert "in parts" in indexed[0].error
    assert indexed[1].error == ""


@pytest.mark.parametrize("backend", [EmbeddingBackend.BFLOAT16, EmbeddingBackend.INT8])
def test_a_job_embeds_in_the_numbers_of_its_index(tmp_path: Path, minilm: Embedder, backend: EmbeddingBackend) -> None:
    (event,) = documents_of(run(tmp_path, ["The maps lie in a blue house."], minilm, backend=backend))
    expected = minilm.load(MINILM, backend).encode(["The maps lie in a blue house."], EmbedRole.PASSAGE)
    assert np.abs(read_vectors(event) - expected).max() < 1e-4
    assert np.abs(read_vectors(event) - minilm.embed(MINILM, ["The maps lie in a blue house."], EmbedRole.PASSAGE)).max() > 2e-4


def test_a_job_without_one_good_document_fails(tmp_path: Path, minilm: Embedder) -> None:
    with pytest.raises(JobFailure) as failed:
        run(tmp_path, ["", "\n"], minilm)
    assert failed.value.reason is FailureReason.DOCUMENTS_INVALID


def test_a_job_without_documents_is_done_at_once(tmp_path: Path, minilm: Embedder) -> None:
    assert [event.kind for event in run(tmp_path, [], minilm)] == ["space_found", "started", "finalizing", "result_ready"]


def test_a_cancel_stops_between_windows_and_gives_no_result(tmp_path: Path) -> None:
    answers = iter([False, False, True])
    embedder = Embedder({"/tiny": build_tiny_xlm_roberta(tmp_path / "tiny")}.__getitem__)
    texts = ["One. " * 2_000, "Two. " * 4_000, "Three."]
    events = run(tmp_path, texts, embedder, "/tiny", should_stop=lambda: next(answers, True))
    assert not any(isinstance(event, Finalizing | ResultReady) for event in events)
    assert len(documents_of(events)) < 3


def test_a_model_that_cannot_be_had_fails_the_job_with_advice(tmp_path: Path) -> None:
    def resolve(name: str) -> Path:
        raise NotFound.of("embedding model", name)

    with pytest.raises(JobFailure) as failed:
        run(tmp_path, ["x"], Embedder(resolve), "no/such")
    assert failed.value.reason is FailureReason.EMBEDDING_MODEL_UNAVAILABLE
    assert failed.value.suggestion


def test_chunks_longer_than_the_model_reads_and_untuned_models_are_warned_of(tmp_path: Path) -> None:
    arabert = "aubmindlab/bert-base-arabertv02"
    embedder = Embedder({arabert: build_tiny_xlm_roberta(tmp_path / "tiny")}.__getitem__)
    events = run(tmp_path, ["بيت أزرق."], embedder, arabert, Chunking(200, 0))
    assert [event.code for event in events if isinstance(event, Warned)] == ["EMBEDDING_MODEL_NOT_TUNED", "CHUNKS_SHORTENED"]
