"""RAG models that are READY, with documents that can be searched by words; their vectors mean nothing."""

import itertools
from collections.abc import Sequence

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.documents import NewDocument
from server.domain.events import ResultReady
from server.domain.ids import CHUNK, DOCUMENT, new_id
from server.domain.jobs import JobState
from server.domain.models import Model
from server.domain.retrieval import Chunk
from tests.db.samples import ORGANIZATION, make_vectors, start_job


def cut(text: str, *ends: int) -> list[Chunk]:
    """Cut a text at these places."""
    places = [0, *ends, len(text)]
    spans = list(itertools.pairwise(places))
    return [Chunk(new_id(CHUNK), number, text[start:end], start, end, 5) for number, (start, end) in enumerate(spans)]


async def index_documents(
    database: PostgresDatabase, model: Model, documents: Sequence[NewDocument], chunks: Sequence[Sequence[Chunk]] = ()
) -> list[str]:
    """Index documents of a model that was stored, each as one chunk where none are given; give their ids."""
    new = [(new_id(DOCUMENT), document) for document in documents]
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.documents.insert(model.model_id, new)
    queue = PostgresJobQueue(database)
    lease = await start_job(database, queue, model)
    for place, (document_id, document) in enumerate(new):
        pieces = chunks[place] if chunks else cut(document.text)
        await queue.commit_document(lease, document_id, pieces, make_vectors(len(pieces)).tobytes(), 8, "", len(new))
    await queue.change_state(lease, JobState.FINALIZING, "")
    await queue.complete(lease, ResultReady())
    return [document_id for document_id, _ in new]
