"""The engine's embedding lanes: texts keep their order, a query does not wait for many texts, and who leaves stops the work."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Sequence

import pytest

from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.generation import EmbedRole
from server.inference.embedding import BULK_NICENESS, MAX_QUERIES_AT_ONCE, SLICE_CHARACTERS, EmbeddingLanes

PASSAGE, QUERY = EmbedRole.PASSAGE, EmbedRole.QUERY


class Held:
    """Embeds a text to its length and its first letter; a text with "wait" in it takes until `gate` opens, and so does loading "slow"."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.embedded: list[Sequence[str]] = []
        self.niceness: dict[EmbedRole, int] = {}
        self._loaded: set[str] = set()

    def is_loaded(self, embedding_model: str, backend: EmbeddingBackend) -> bool:
        """Tell whether `load` was there."""
        return embedding_model in self._loaded

    def load(self, embedding_model: str, backend: EmbeddingBackend) -> None:
        """Take a model in."""
        if embedding_model == "slow":
            assert self.gate.wait(10)
        self._loaded.add(embedding_model)

    def embed_texts(self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend) -> Embeddings:
        """Give [length, letter] for each text."""
        self.embedded.append(texts)
        self.niceness[role] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        if any("wait" in text for text in texts):
            assert self.gate.wait(10)
        return Embeddings([[float(len(text)), float(ord(text[0]))] for text in texts], 2, [len(text) for text in texts], 512)


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
async def lanes(held: Held) -> AsyncIterator[EmbeddingLanes]:
    made = EmbeddingLanes(held)
    yield made
    held.gate.set()
    made.stop()


async def test_texts_keep_their_order_through_slices_of_like_length(held: Held, lanes: EmbeddingLanes) -> None:
    texts = ["a" * length for length in (5, SLICE_CHARACTERS + 1, 700, 6_000, 1, 3_000)]
    given = await lanes.embed("m", texts, PASSAGE)
    assert [vector[0] for vector in given.vectors] == [len(text) for text in texts] == list(given.token_counts)
    assert [[len(text) for text in part] for part in held.embedded] == [[SLICE_CHARACTERS + 1], [6_000], [3_000, 700, 5, 1]]


async def test_a_query_does_not_wait_for_many_texts(held: Held, lanes: EmbeddingLanes) -> None:
    bulk = asyncio.create_task(lanes.embed("m", ["wait"] + ["x"] * 50, PASSAGE))
    many = asyncio.create_task(lanes.embed("m", ["x"] * (MAX_QUERIES_AT_ONCE + 1), QUERY))
    async with asyncio.timeout(5):
        assert (await lanes.embed("m", ["q"], QUERY)).vectors == [[1.0, float(ord("q"))]]
    assert not bulk.done()
    assert not many.done()
    held.gate.set()
    assert len((await bulk).vectors) == 51
    assert len((await many).vectors) == MAX_QUERIES_AT_ONCE + 1


async def test_only_many_texts_are_embedded_behind_everything_else(held: Held, lanes: EmbeddingLanes) -> None:
    await lanes.embed("m", ["q"], QUERY)
    await lanes.embed("m", ["p"], PASSAGE)
    assert held.niceness[PASSAGE] == max(BULK_NICENESS, held.niceness[QUERY])
    assert held.niceness[QUERY] == os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


async def test_loading_a_model_holds_nobody_up_who_asks_another(lanes: EmbeddingLanes) -> None:
    await lanes.embed("m", ["q"], QUERY)
    loading = asyncio.create_task(lanes.embed("slow", ["q"], QUERY))
    async with asyncio.timeout(5):
        await lanes.embed("m", ["q"], QUERY)
    assert not loading.done()
    loading.cancel()


async def test_who_leaves_stops_the_work_after_the_slice_that_runs(held: Held, lanes: EmbeddingLanes) -> None:
    texts = ["wait" + "x" * SLICE_CHARACTERS, *("y" * SLICE_CHARACTERS for _ in range(5))]
    leaving = asyncio.create_task(lanes.embed("m", texts, PASSAGE))
    async with asyncio.timeout(5):
        while not held.embedded:  # noqa: ASYNC110  # a thread's doing is polled
            await asyncio.sleep(0.01)
    leaving.cancel()
    held.gate.set()
    await lanes.embed("m", ["z"], PASSAGE)
    assert [part[0][0] for part in held.embedded] == ["w", "z"]
