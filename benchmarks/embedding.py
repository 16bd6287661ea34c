"""Embedding beside a bare SentenceTransformer.encode of the same texts, in one run: `python -m benchmarks.embedding`.

all-MiniLM-L6-v2 on the stories of GSM8K (English) and the passages of ARCD (Arabic), texts of mixed length. Ours goes the way of an index
job and the way of the engine, through its socket. Rounds alternate and the best of each counts, since other work disturbs all alike.
Quality is how the question that ends a story of GSM8K finds its story.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.retrieval import MINILM, Collection, read_arcd, read_gsm8k
from server.basemodels.sources import BaseModelSource
from server.domain.embeddings import EmbeddingBackend
from server.domain.errors import ServiceError
from server.domain.generation import EmbedRole
from server.domain.retrieval import Chunk
from server.inference.batching import BatchLimits
from server.inference.client import EngineClient
from server.inference.engine import EmbeddedEngine
from server.inference.library import LoadingOptions
from server.inference.server import serve
from server.rag.embedding import Embedder, LoadedModel, Vectors
from server.rag.index_child import embed_chunks
from server.services.embedding import MAX_TEXTS
from server.storage.artefacts import ArtefactStore

TOP_K = 10
MILLISECONDS = 1e3


@asynccontextmanager
async def run_engine(source: BaseModelSource, embedder: Embedder, directory: Path) -> AsyncIterator[EngineClient]:
    """Serve an engine behind its socket, and give a client of it."""
    engine = EmbeddedEngine(
        base_models=source, versions=ArtefactStore(directory), embedder=embedder, options=LoadingOptions(BatchLimits()), max_model_bytes=1
    )
    stop, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(serve(engine, directory / "engine.sock", stop=stop, on_ready=ready.set))
    await ready.wait()
    client = EngineClient(directory / "engine.sock")
    yield client
    await client.close()
    stop.set()
    await task


async def take_best(rounds: int, ways: Mapping[str, Callable[[], Awaitable[None]]]) -> dict[str, float]:
    """Give the seconds of each way's best round; in a round each way has its turn."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, work in ways.items():
            start = time.perf_counter()
            await work()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


class Contest:
    """The same texts through the library, through an index job's way and through the engine."""

    def __init__(self, library: SentenceTransformer, embedder: Embedder, client: EngineClient, texts: Sequence[str]) -> None:
        self._library, self._embedder, self._client, self._texts = library, embedder, client, list(texts)
        self._chunks = [Chunk(f"chk_{place}", place, text, 0, len(text), 1) for place, text in enumerate(texts)]

    async def by_library(self) -> None:
        """Encode as it comes."""
        self._library.encode(self._texts, normalize_embeddings=True, show_progress_bar=False)

    async def by_index_job(self) -> None:
        """Embed as the child of an index job does."""
        embed_chunks(self._embedder.load(MINILM), self._chunks, lambda: False)

    async def by_engine(self) -> None:
        """Embed as the Embed RPC does, as many at once as it allows."""
        for first in range(0, len(self._texts), MAX_TEXTS):
            await self._client.embed(MINILM, self._texts[first : first + MAX_TEXTS], EmbedRole.PASSAGE)

    async def single_by_library(self) -> None:
        """Encode one by one."""
        for text in self._texts:
            self._library.encode([text], normalize_embeddings=True, show_progress_bar=False)

    async def single_by_embedder(self) -> None:
        """Embed one by one in this process."""
        for text in self._texts:
            self._embedder.embed(MINILM, [text], EmbedRole.QUERY)

    async def single_by_engine(self) -> None:
        """Embed one by one through the engine's socket."""
        for text in self._texts:
            await self._client.embed(MINILM, [text], EmbedRole.QUERY)


def find_reciprocal_rank(queries: Vectors, passages: Vectors, places: Sequence[int]) -> float:
    """Give MRR@10 of an exact search; passage `places[i]` answers query i."""
    similarities = queries @ passages.T
    right = similarities[np.arange(len(places)), places]
    ranks = (similarities >= right[:, None]).sum(axis=1)
    return float(np.where(ranks <= TOP_K, 1 / ranks, 0).mean())


async def compare_speed(library: SentenceTransformer, embedder: Embedder, client: EngineClient, data: dict[str, Collection]) -> None:
    """Print seconds for many passages and for single queries."""
    print(f"{'texts':34}{'theirs':>12}{'index job':>12}{'ratio':>8}{'engine':>12}{'ratio':>8}")
    for name, collection in data.items():
        contest = Contest(library, embedder, client, collection.passages)
        ways = {"library": contest.by_library, "job": contest.by_index_job, "engine": contest.by_engine}
        best = await take_best(4, ways)
        rate = {way: len(collection.passages) / seconds for way, seconds in best.items()}
        ratios = rate["job"] / rate["library"], rate["engine"] / rate["library"]
        print(
            f"{name + f', {len(collection.passages):,} passages, 1/s':34}{rate['library']:12.1f}{rate['job']:12.1f}{ratios[0]:8.2f}"
            f"{rate['engine']:12.1f}{ratios[1]:8.2f}",
            flush=True,
        )
    print(f"{'':34}{'theirs':>12}{'in process':>12}{'ratio':>8}{'engine':>12}{'ratio':>8}")
    for name, collection in data.items():
        queries = [query for query, _ in collection.queries[:100]]
        contest = Contest(library, embedder, client, queries)
        best = await take_best(
            4, {"library": contest.single_by_library, "own": contest.single_by_embedder, "engine": contest.single_by_engine}
        )
        milliseconds = {way: seconds / len(queries) * MILLISECONDS for way, seconds in best.items()}
        ratios = milliseconds["library"] / milliseconds["own"], milliseconds["library"] / milliseconds["engine"]
        print(
            f"{name + ', one query, ms':34}{milliseconds['library']:12.2f}{milliseconds['own']:12.2f}{ratios[0]:8.2f}"
            f"{milliseconds['engine']:12.2f}{ratios[1]:8.2f}",
            flush=True,
        )


async def compare_backends(embedder: Embedder, collection: Collection) -> None:
    """Print speed and quality in each kind of numbers that this processor can compute in; queries and passages in the same."""
    print(f"{'numbers':34}{'passages/s':>12}{'MRR@10':>8}")
    queries, places = [query for query, _ in collection.queries], [place for _, place in collection.queries]
    loaded: dict[str, LoadedModel] = {}
    for backend in EmbeddingBackend:
        try:
            loaded[backend] = embedder.load(MINILM, backend)
        except ServiceError as refusal:
            print(f"{backend:34}{refusal}")

    async def embed(backend: str) -> None:
        loaded[backend].encode(collection.passages, EmbedRole.PASSAGE)

    best = await take_best(3, {backend: partial(embed, backend) for backend in loaded})
    for name, model in loaded.items():
        vectors = model.encode(queries, EmbedRole.QUERY), model.encode(collection.passages, EmbedRole.PASSAGE)
        print(f"{name:34}{len(collection.passages) / best[name]:12.1f}{find_reciprocal_rank(*vectors, places):8.4f}", flush=True)


async def run(data_path: Path, english_records: int, *, only_numbers: bool) -> None:
    """Measure all, or only the kinds of numbers."""
    with tempfile.TemporaryDirectory(prefix="embedding-") as directory:
        source = BaseModelSource(Path(directory) / "cache", offline=True)
        embedder = Embedder(lambda name: source.resolve(name).directory)
        english = read_gsm8k(data_path / "gsm8k/train.jsonl", english_records)
        print(f"{torch.get_num_threads()} threads; ratios above 1: ours is faster")
        await compare_backends(embedder, english)
        if only_numbers:
            return
        library = SentenceTransformer(str(source.resolve(MINILM).directory), device="cpu", local_files_only=True)
        arabic = read_arcd(data_path / "arcd/arcd-train.json")
        async with run_engine(source, embedder, Path(directory)) as client:
            await compare_speed(library, embedder, client, {"GSM8K": english, "ARCD": arabic})


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of arcd/ and gsm8k/")
    parser.add_argument("--english-records", type=int, default=500)
    parser.add_argument("--only-numbers", action="store_true", help="compare the kinds of numbers and nothing else")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.data, arguments.english_records, only_numbers=arguments.only_numbers))


if __name__ == "__main__":
    main()
