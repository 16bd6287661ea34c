"""The held-out check: dense retrieval through the whole path, against Sentence Transformers and an exact search by numpy."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from sentence_transformers import SentenceTransformer

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.documents import NewDocument
from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.events import ResultReady
from server.domain.generation import EmbedRole
from server.domain.ids import CHUNK, DOCUMENT, new_id
from server.domain.jobs import JobState
from server.domain.retrieval import Chunk, RetrievalOverrides, SearchMode
from server.rag.embedding import Embedder
from server.services.model_ports import Engine
from server.services.requests import Retrieve
from server.services.retrieval import Retrieval
from tests.db.samples import ORGANIZATION, add_model, make_rag_model, start_job
from tests.rag.conftest import MINILM

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = 30


class EmbedderEngine:
    """What retrieval needs of an engine, in this process."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    async def embed(self, _model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend) -> Embeddings:
        """Embed with MiniLM."""
        return await asyncio.to_thread(self._embedder.embed_texts, MINILM, texts, role, backend)


def read_texts() -> tuple[list[str], list[str]]:
    """Give some hundred different passages, and questions about some of them."""
    passages = [part for path in sorted((EXAMPLES / "documents").iterdir()) for part in path.read_text("utf-8").split("\n\n")]
    records = [json.loads(line) for line in (EXAMPLES / "records" / "training.jsonl").read_text("utf-8").splitlines()]
    passages += [" ".join(turn["content"] for turn in record["messages"] if turn["role"] != "system") for record in records]
    held_out = [json.loads(line)["messages"] for line in (EXAMPLES / "records" / "held_out.jsonl").read_text("utf-8").splitlines()]
    questions = [json.loads(line)["query"] for line in (EXAMPLES / "records" / "queries.jsonl").read_text("utf-8").splitlines()]
    questions += [next(turn["content"] for turn in messages if turn["role"] == "user") for messages in held_out]
    return list(dict.fromkeys(passages))[:320], list(dict.fromkeys(questions))[:QUESTIONS]


async def index(database: PostgresDatabase, embedder: Embedder, passages: Sequence[str]) -> str:
    """Index the passages, each a chunk of one document; give the model."""
    model = await add_model(database, make_rag_model())
    text = "\n".join(passages)
    new = [(new_id(DOCUMENT), NewDocument(text))]
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.documents.insert(model.model_id, new)
    queue = PostgresJobQueue(database)
    lease = await start_job(database, queue, model)
    vectors = embedder.embed(MINILM, passages, EmbedRole.PASSAGE).astype("<f2")
    chunks = [Chunk(new_id(CHUNK), place, passage, 0, len(passage), 1) for place, passage in enumerate(passages)]
    await queue.commit_document(lease, new[0][0], chunks, vectors.tobytes(), vectors.shape[1], "", 1)
    await queue.change_state(lease, JobState.FINALIZING, "")
    await queue.complete(lease, ResultReady())
    return model.model_id


async def test_the_ten_best_are_those_of_sentence_transformers_and_numpy(
    database: PostgresDatabase, minilm: Embedder, minilm_directory: Path
) -> None:
    passages, questions = read_texts()
    assert len(passages) > 250
    assert len(questions) == QUESTIONS
    library = SentenceTransformer(str(minilm_directory), device="cpu", local_files_only=True)
    expected = library.encode(passages, normalize_embeddings=True)
    asked = library.encode(questions, normalize_embeddings=True)
    similarities = asked @ expected.T
    model_id = await index(database, minilm, passages)
    retrieval = Retrieval(database, cast(Engine, EmbedderEngine(minilm)))
    overrides = RetrievalOverrides(top_k=10, similarity_threshold=-1.0, search_mode=SearchMode.DENSE)
    for number, question in enumerate(questions):
        found = await retrieval.retrieve(ORGANIZATION, Retrieve(model_id, question, overrides))
        given = [hit.chunk.position for hit in found.chunks]
        assert given == list(np.argsort(-similarities[number], kind="stable")[:10]), question
        scores = [hit.scores.similarity or 0.0 for hit in found.chunks]
        assert np.abs(np.array(scores) - similarities[number][given]).max() < 1e-3
