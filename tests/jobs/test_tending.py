"""A worker as it is deployed sees to the indexes of large collections, beside its jobs."""

import asyncio
import os
import sys

import psycopg

from server.db.terms import EVERY_CHUNK
from server.db.vector_placement import INDEXED_FROM_CHUNKS
from server.domain.documents import NewDocument
from server.domain.ids import DOCUMENT, new_id
from tests.db import samples
from tests.jobs.stage import ROOT, Stage

DIMENSION = 8


async def add_collection(stage: Stage) -> None:
    """A model with a document of a few chunks."""
    model = await samples.add_model(stage.database, samples.make_rag_model())
    document = new_id(DOCUMENT)
    async with stage.database.transaction(samples.ORGANIZATION) as transaction:
        await transaction.documents.insert(model.model_id, [(document, NewDocument("text"))])
    lease = await samples.start_job(stage.database, stage.queue, model)
    chunks, vectors = samples.make_chunks(["one", "two", "three"]), samples.make_vectors(3, DIMENSION)
    await stage.queue.commit_document(lease, document, chunks, vectors.tobytes(), DIMENSION, "", 1)
    await samples.finish_job(stage.queue, lease)


async def test_a_worker_gives_a_large_collection_its_index(stage: Stage) -> None:
    await add_collection(stage)
    environment = {**os.environ, "DATABASE_URL": stage.database_url, "DATA_DIRECTORY": str(stage.storage)}
    async with await psycopg.AsyncConnection.connect(stage.database_url, autocommit=True) as connection:
        # As a collection of so many chunks counts itself: to write them all would take minutes.
        await connection.execute("UPDATE term_counts SET chunk_count = %s WHERE term = %s", (INDEXED_FROM_CHUNKS, EVERY_CHUNK))

        async def is_indexed() -> bool:
            query = "SELECT 1 FROM rag_indexes JOIN pg_index ON indexrelid = to_regclass(vector_table || '_hnsw') WHERE indisvalid"
            return await (await connection.execute(query)).fetchone() is not None

        assert not await is_indexed()
        worker = await asyncio.create_subprocess_exec(sys.executable, "-m", "server", "worker", cwd=ROOT, env=environment)
        try:
            await stage.wait_until(is_indexed)
        finally:
            worker.terminate()
            ended = await asyncio.wait_for(worker.wait(), 30)
    assert ended == 0
