"""The child side of a RAG_INDEX job: documents in, chunks and vectors out, one event per document. Knows no database.

One bad document fails alone, with its reason; what ends the job is raised as JobFailure.
"""

import base64
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from server.childprocess import measure_peak_memory
from server.domain.catalogue import NOT_TUNED_NOTE, find_embedding_model
from server.domain.documents import DocumentReading
from server.domain.errors import ServiceError
from server.domain.events import ChildEvent, DocumentIndexed, Finalizing, IndexAdvanced, ResultReady, SpaceFound, Started, Warned
from server.domain.generation import EmbedRole
from server.domain.jobs import FailureReason, IndexCounters, JobFailure
from server.domain.orders import IndexOrder, StagedDocument
from server.domain.rag_indexes import MeasuredSpace
from server.domain.retrieval import Chunk
from server.domain.specs import IndexSpec
from server.rag.calibration import calibrate
from server.rag.chunking import resolve_chunk_tokens
from server.rag.cutting import CutDocument, DocumentCutter
from server.rag.embedding import Embedder, LoadedModel, Vectors
from server.rag.parsing.document import Limits
from server.rag.passages import write_passages
from server.services.codec import Codec

# One event carries a whole document; the worker reads and commits it at once.
MAX_EVENT_BYTES = 64 << 20
_DOCUMENT = Codec[StagedDocument](StagedDocument)


@dataclass(slots=True)
class _Tally:
    """What a run has done so far."""

    documents: int = 0
    failed_documents: int = 0
    chunks: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    counters: IndexCounters = IndexCounters()

    def count(self, **more: int) -> IndexAdvanced:
        """Count what was read, cut or embedded; say how far it is."""
        self.counters = self.counters.add(IndexCounters(**more))
        return IndexAdvanced(self.counters)

    def add(self, event: DocumentIndexed) -> None:
        """Count a document."""
        self.documents += 1
        self.failed_documents += bool(event.error)
        self.chunks += len(event.chunks)
        self.tokens += sum(chunk.token_count for chunk in event.chunks)


def run_index(
    order: IndexOrder,
    storage_root: Path,
    embedder: Embedder,
    emit: Callable[[ChildEvent], None],
    should_stop: Callable[[], bool],
    *,
    fetch: Callable[[str], Path],
    limits: Limits | None = None,
    max_event_bytes: int = MAX_EVENT_BYTES,
) -> None:
    """Index the documents of an order; returns early, without a result, where `should_stop` says so. Raises JobFailure.

    `fetch` gives the place of a stored file on this disk. A document whose event would be longer than `max_event_bytes` is refused.
    """
    loaded = _load(embedder, order.spec)
    known = loaded.space.fingerprint == order.calibrated_fingerprint
    emit(SpaceFound(MeasuredSpace(loaded.space, None if known else calibrate(loaded))))
    emit(Started(total_steps=order.document_count))
    for warning in _find_warnings(order, loaded):
        emit(warning)
    tally = _Tally()

    def report(**more: int) -> None:
        emit(tally.count(**more))

    bytes_per_vector = loaded.dimension * 2 * 4 // 3 + 256
    cutter = DocumentCutter(order.spec.chunking, loaded.tokenizer, fetch, limits or Limits(), bytes_per_vector, max_event_bytes)
    for group in _group(_cut_documents(storage_root / order.documents_path, cutter, report), loaded.texts_per_window):
        vectors = embed_chunks(loaded, [chunk for cut in group for chunk in cut.new_chunks], should_stop, report)
        if vectors is None:
            return
        for event in _make_events(group, vectors, loaded.dimension):
            tally.add(event)
            emit(event)
    if tally.documents and tally.documents == tally.failed_documents:
        raise JobFailure(
            FailureReason.DOCUMENTS_INVALID,
            "None of the documents could be indexed; each one says why.",
            "Correct the documents and add them again.",
        )
    emit(Finalizing())
    emit(_make_result(tally))


def _load(embedder: Embedder, spec: IndexSpec) -> LoadedModel:
    try:
        return embedder.load(spec.embedding_model, spec.embedding_backend)
    except ServiceError as error:
        suggestion = "Choose another embedding model, or make this one available to the service."
        raise JobFailure(FailureReason.EMBEDDING_MODEL_UNAVAILABLE, str(error), suggestion) from error


def _find_warnings(order: IndexOrder, loaded: LoadedModel) -> Iterator[Warned]:
    known = find_embedding_model(order.spec.embedding_model)
    if known is not None and not known.tuned_for_retrieval:
        yield Warned("EMBEDDING_MODEL_NOT_TUNED", NOT_TUNED_NOTE)
    asked = order.spec.chunking.max_tokens
    given, _ = resolve_chunk_tokens(order.spec.chunking, loaded.tokenizer)
    if asked > given:
        yield Warned("CHUNKS_SHORTENED", f"Chunks have at most {given} tokens, not {asked}: the embedding model reads no more.")


def _cut_documents(path: Path, cutter: DocumentCutter, report: Callable[..., None]) -> Iterator[CutDocument]:
    """Read the documents one by one and cut them."""
    with path.open("rb") as lines:
        for line in lines:
            cut = cutter.cut(_DOCUMENT.decode(line))
            reused = len(cut.reading.reused)
            report(parsed_documents=1, chunked_chunks=len(cut.chunks), embedded_chunks=reused, reused_chunks=reused)
            yield cut


def _group(cuts: Iterator[CutDocument], chunks_per_group: int) -> Iterator[list[CutDocument]]:
    """Put small documents together; one that was refused or is large ends its group."""
    group: list[CutDocument] = []
    for cut in cuts:
        group.append(cut)
        if sum(len(one.new_chunks) for one in group) >= chunks_per_group or cut.error:
            yield group
            group = []
    if group:
        yield group


def _say_nothing(**_: int) -> None:
    """Report to nobody."""


def embed_chunks(
    loaded: LoadedModel, chunks: Sequence[Chunk], should_stop: Callable[[], bool], report: Callable[..., None] = _say_nothing
) -> Vectors | None:
    """Embed chunks in groups; None where the job was told to stop in between."""
    rows: list[Vectors] = [np.zeros((0, loaded.dimension), dtype=np.float32)]
    window = loaded.texts_per_window
    for first in range(0, len(chunks), window):
        if should_stop():
            return None
        passages = write_passages(chunks[first : first + window], loaded.tokenizer)
        rows.append(loaded.encode(passages, EmbedRole.PASSAGE))
        report(embedded_chunks=len(passages))
    return np.concatenate(rows)


def _make_events(group: Sequence[CutDocument], vectors: Vectors, dimension: int) -> Iterator[DocumentIndexed]:
    first = 0
    for cut in group:
        count = len(cut.new_chunks)
        rows = vectors[first : first + count]
        first += count
        if not np.isfinite(rows).all():
            reading = DocumentReading(cut.reading.revision)
            message = "The embedding model gave numbers that are none for this text."
            yield DocumentIndexed(cut.document_id, (), "", dimension, message, reading)
        else:
            encoded = base64.b64encode(rows.astype("<f2").tobytes()).decode("ascii")
            yield DocumentIndexed(cut.document_id, cut.chunks, encoded, dimension, cut.error, cut.reading)


def _make_result(tally: _Tally) -> ResultReady:
    seconds = time.monotonic() - tally.started
    counts = {"documents": tally.documents, "failed_documents": tally.failed_documents, "chunks": tally.chunks, "tokens": tally.tokens}
    return ResultReady(
        metrics={name: float(count) for name, count in counts.items()},
        compute_seconds=seconds,
        peak_memory_bytes=measure_peak_memory(),
    )
