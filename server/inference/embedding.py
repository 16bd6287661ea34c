"""Embedding in the engine's process: queries at once, many texts slice by slice and behind everything else that computes there."""

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Protocol, TypeVar

from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.generation import EmbedRole
from server.inference.passingthread import PassingThread

T = TypeVar("T")
# So many queries are embedded at once; more texts, and passages, are many.
MAX_QUERIES_AT_ONCE = 8
# About the tokens of one batch: between slices others have their turn, and a caller who has left is noticed.
SLICE_CHARACTERS = 8_192
# Of the threads that embed many texts: beside a generation or a query they get the time that these leave.
BULK_NICENESS = 10


class Embedder(Protocol):
    """Embeds texts (rag/embedding.py, injected by app/). Blocking; any thread may call it."""

    def is_loaded(self, embedding_model: str, backend: EmbeddingBackend) -> bool:
        """Tell whether the model is in memory."""

    def load(self, embedding_model: str, backend: EmbeddingBackend) -> object:
        """Bring the model into memory. Raises ServiceError."""

    def embed_texts(self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend) -> Embeddings:
        """Embed to unit vectors. Raises ServiceError."""


class EmbeddingLanes:
    """Threads that embed: one for a few queries, one for many texts, one that loads. Belongs to one event loop."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._queries = PassingThread("engine-queries")
        self._bulk = PassingThread("engine-bulk", _be_nice)
        self._loads = PassingThread("engine-encoder-loads")

    def stop(self) -> None:
        """End after what runs."""
        for executor in (self._queries, self._bulk, self._loads):
            executor.shutdown(wait=False, cancel_futures=True)

    async def embed(
        self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend = EmbeddingBackend.FLOAT32
    ) -> Embeddings:
        """Embed to unit vectors, in the order of the texts. Cancelled, it ends after the slice that runs."""
        if not self._embedder.is_loaded(embedding_model, backend):
            await _run(self._loads, partial(self._embedder.load, embedding_model, backend))
        if role is EmbedRole.QUERY and len(texts) <= MAX_QUERIES_AT_ONCE:
            return await _run(self._queries, partial(self._embedder.embed_texts, embedding_model, texts, role, backend))
        parts = []
        places = _slice(texts)
        for part in places:
            parts.append(
                await _run(
                    self._bulk, partial(self._embedder.embed_texts, embedding_model, [texts[place] for place in part], role, backend)
                )
            )
        return _join(places, parts)


async def _run(executor: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)


def _be_nice() -> None:
    # Linux: the niceness is a thread's own, and the threads that torch starts from it inherit it.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BULK_NICENESS)


def _slice(texts: Sequence[str]) -> list[list[int]]:
    """Cut the places of texts, longest first, into slices: texts of like length fill a batch best."""
    slices: list[list[int]] = [[]]
    characters = 0
    for place in sorted(range(len(texts)), key=lambda place: len(texts[place]), reverse=True):
        if slices[-1] and characters + len(texts[place]) > SLICE_CHARACTERS:
            slices.append([])
            characters = 0
        slices[-1].append(place)
        characters += len(texts[place])
    return slices


def _join(slices: Sequence[Sequence[int]], parts: Sequence[Embeddings]) -> Embeddings:
    """Put what came of slices back into the order of the texts."""
    vectors: dict[int, Sequence[float]] = {}
    counts: dict[int, int] = {}
    for places, part in zip(slices, parts, strict=True):
        vectors |= zip(places, part.vectors, strict=True)
        counts |= zip(places, part.token_counts, strict=True)
    order = range(len(vectors))
    # A model may have been loaded again between two slices, with other files.
    fingerprints = {part.fingerprint for part in parts}
    return Embeddings(
        [vectors[place] for place in order],
        parts[0].dimension,
        [counts[place] for place in order],
        parts[0].max_tokens,
        fingerprints.pop() if len(fingerprints) == 1 else "",
    )
