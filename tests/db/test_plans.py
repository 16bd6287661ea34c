"""Every query of a list, the queue, the log and the feed finds its rows through an index, as EXPLAIN says over thousands of rows."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL, Literal
from sqlalchemy import Connection, Engine, event, update

from server.db.database import PostgresDatabase, PostgresTransaction
from server.db.feed import PostgresJobFeed
from server.db.queue import PostgresJobQueue
from server.db.tables import jobs
from server.domain.documents import DocumentState, NewDocument
from server.domain.events import StateChanged
from server.domain.ids import DATASET, DOCUMENT, JOB, MODEL
from server.domain.jobs import JobKind, JobState
from server.domain.models import ModelState, ModelType
from server.domain.retrieval import QueryTerm, RetrievalSettings, Search, SearchMode
from server.services.codec import LOGGED_PAYLOAD, SPEC
from server.services.job_queue import Lease
from server.services.ports import JobFilter, ModelFilter, Page
from tests.db.samples import LIMITS, make_job, make_model, make_rag_model, make_step

ORGANIZATION = "org7"  # one of twenty
# Ids that the rows below have: a prefix, and a number in the alphabet of ids.
MODEL_ID, JOB_ID, DATASET_ID, DOCUMENT_ID = (f"{prefix}_{77:024d}" for prefix in (MODEL, JOB, DATASET, DOCUMENT))
RETRY_ID = f"{JOB}_{78:024d}"
LEASE = Lease(ORGANIZATION, JOB_ID, 1)

ROWS = """
INSERT INTO models SELECT 'org' || o, 'mdl_' || lpad(n::text, 24, '0'), CASE n % 10 WHEN 0 THEN 'RAG' ELSE 'FINE_TUNED' END, 'm', '',
    '{{}}', CASE n % 10 WHEN 0 THEN 'FAILED' ELSE 'READY' END, 'base' || n % 50, 'LORA', 1, NULL,
    CASE WHEN n % 10 = 0 THEN 'mdl_' || lpad('77', 24, '0') END, NULL, now(), now()
    FROM generate_series(1, 20) o, generate_series(1, 100) n;
INSERT INTO datasets SELECT 'org' || o, 'ds_' || lpad(n::text, 24, '0'), 'd', 'JSONL', 'CHAT', 1, 0, 1, 'x', 'p', '[]', now()
    FROM generate_series(1, 20) o, generate_series(1, 100) n;
INSERT INTO jobs SELECT 'org' || o, 'job_' || lpad(n::text, 24, '0'), CASE n % 10 WHEN 0 THEN 'RAG_INDEX' ELSE 'FINE_TUNE' END,
    'mdl_' || lpad(((n - 1) % 100 + 1)::text, 24, '0'),
    CASE WHEN n = 77 THEN 'RUNNING' WHEN n % 100 = 0 THEN 'QUEUED' WHEN n % 100 = 50 THEN 'FAILED' ELSE 'SUCCEEDED' END, '',
    {spec}, 'base', 'ds_' || lpad(((n - 1) % 100 + 1)::text, 24, '0'), NULL, NULL, '{{}}', NULL, 0, 0, 0, 0, 1, 0, 50, 40, 1,
    NULL, NULL, CASE WHEN n = 77 THEN now() + interval '1 day' END, now(), now(), now(), now()
    FROM generate_series(1, 20) o, generate_series(1, 500) n;
UPDATE jobs SET spec = spec || jsonb_build_object('warm_start_from', jsonb_build_object('model_id', model_id, 'version', 1))
    WHERE job_id = 'job_' || lpad('77', 24, '0');
INSERT INTO job_events SELECT 'org7', 'job_' || lpad(n::text, 24, '0'), s, now(), 1, 'step', s, {step}
    FROM generate_series(1, 100) n, generate_series(1, 50) s;
INSERT INTO job_events SELECT 'org7', 'job_' || lpad(n::text, 24, '0'), 0, now(), 1, 'state_changed', NULL, {running}
    FROM generate_series(1, 100) n;
UPDATE jobs SET retry_of_job_id = 'job_' || lpad('77', 24, '0') WHERE job_id = 'job_' || lpad('78', 24, '0');
INSERT INTO checkpoints SELECT 'org7', 'job_' || lpad(n::text, 24, '0'), s, 'p', 1, NULL, now()
    FROM generate_series(1, 500) n, generate_series(1, 5) s;
INSERT INTO model_versions SELECT organization, model_id, 1, 'job_' || model_id, '', '', '', '', 1, '{{}}', now() FROM models;
INSERT INTO model_exports SELECT organization, model_id, 1, f, 'job_x', '', '', 1, '{{}}', now()
    FROM models, unnest(array['ADAPTER', 'MERGED']) f;
INSERT INTO documents SELECT 'org7', 'mdl_' || lpad(n::text, 24, '0'), 'doc_' || lpad(d::text, 24, '0'), 't', 'source' || d, 'text', '{{}}',
    CASE WHEN d > 90 THEN 'PENDING' ELSE 'INDEXED' END, 4, 4, 'x', 1, '', now(), 'job', 1, 1, '', '', 4, 'hash' || d
    FROM generate_series(1, 100) n, generate_series(1, 100) d;
INSERT INTO staged_documents SELECT organization, model_id, document_id, 1, title, source_uri, metadata, text, '', 4, original_sha256
    FROM documents WHERE state = 'PENDING';
INSERT INTO rag_indexes (organization, model_id, index_number, state, embedding_model, chunking, revision, fingerprint, create_time)
    SELECT organization, model_id, 1, 'READY', 'e', '{{}}', '', '', now() FROM models;
INSERT INTO chunks SELECT organization, model_id, document_id, 0, 'chk', 'text', 0, 4, 1, NULL, 1, '{{}}', 'hash' FROM documents
    WHERE state = 'INDEXED';
INSERT INTO chunk_vectors SELECT organization, model_id, document_id, position, '[1,0,0]', 1 FROM chunks;
INSERT INTO chunk_terms SELECT organization, model_id, document_id, position, '{{1}}', '{{1:1}}/1000000000', 1 FROM chunks;
INSERT INTO term_counts SELECT 'org7', 'mdl_' || lpad(n::text, 24, '0'), term, 90, 1
    FROM generate_series(1, 100) n, generate_series(0, 100) term;
INSERT INTO requests SELECT 'org' || o, 'Create', 'r' || n, 'x', '{{}}', now() FROM generate_series(1, 20) o, generate_series(1, 200) n;
"""


@dataclass
class Explained:
    """The plans of the statements that ran."""

    indexes: set[str] = field(default_factory=set)
    scanned_tables: set[str] = field(default_factory=set)

    def read(self, plan: dict[str, Any]) -> None:
        """Gather what a plan's nodes read."""
        if "Index Name" in plan:
            self.indexes.add(plan["Index Name"])
        if plan["Node Type"].endswith("Seq Scan"):
            self.scanned_tables.add(plan["Relation Name"])
        for part in plan.get("Plans", ()):
            self.read(part)


@pytest.fixture
def explained() -> Iterator[Explained]:
    """Explains each query and change before it runs, where it runs."""
    found = Explained()

    def explain(connection: Connection, _cursor: object, statement: str, parameters: Any, _context: object, executemany: bool) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")) and "pg_advisory" not in statement and not executemany:
            (row,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
            found.read(row[0][0]["Plan"])

    event.listen(Engine, "before_cursor_execute", explain)
    yield found
    event.remove(Engine, "before_cursor_execute", explain)


@pytest.fixture(scope="module")
def filled_database_url(module_database_url: str) -> str:
    """A database with thousands of rows of twenty organizations. The tests change one or two of them."""
    spec, step = SPEC.encode(make_job(make_model()).spec).decode(), LOGGED_PAYLOAD.encode(make_step(1)).decode()
    running = LOGGED_PAYLOAD.encode(StateChanged(JobState.RUNNING)).decode()
    with psycopg.connect(module_database_url, autocommit=True) as connection:
        connection.execute(SQL(ROWS).format(spec=Literal(spec), step=Literal(step), running=Literal(running)))
        connection.execute("ANALYZE")
    return module_database_url


@pytest.fixture
async def filled(filled_database_url: str) -> AsyncIterator[PostgresDatabase]:
    """A pool on that database."""
    database = PostgresDatabase(filled_database_url)
    yield database
    await database.close()


async def _list_speeds(transaction: PostgresTransaction) -> bool:
    return not await transaction.jobs.list_speeds(5)  # none of these jobs has trained a token


async def _list_none(transaction: PostgresTransaction, where: JobFilter) -> bool:
    return not await transaction.jobs.list(where, Page(5))


def _make_search(mode: SearchMode) -> Search:
    return Search(RetrievalSettings(5, 0.1, mode), [1.0, 0.0, 0.0], [QueryTerm(1, 1.0, True), QueryTerm(2, 0.5, False)])


Call = Callable[[PostgresTransaction], Awaitable[object]]
QUERIES: dict[str, tuple[set[str], Call]] = {
    "a model": ({"models_pkey"}, lambda t: t.models.get(MODEL_ID, lock=True)),
    "models": ({"models_pkey"}, lambda t: t.models.list(ModelFilter(), Page(50, MODEL_ID))),
    "models by type": ({"models_by_type"}, lambda t: t.models.list(ModelFilter(type=ModelType.RAG), Page(5))),
    "models by state": ({"models_by_state"}, lambda t: t.models.list(ModelFilter(state=ModelState.FAILED), Page(5))),
    "models by base": ({"models_by_base_model"}, lambda t: t.models.list(ModelFilter(base_model="base7"), Page(5))),
    "users of a model": ({"models_by_generator"}, lambda t: t.models.list_users(MODEL_ID)),
    "a version": ({"model_versions_pkey", "model_exports_pkey"}, lambda t: t.models.get_version(MODEL_ID, 1)),
    "versions": ({"model_versions_pkey", "model_exports_pkey"}, lambda t: t.models.list_versions(MODEL_ID, 50, 7)),
    "jobs that use a version": ({"jobs_active"}, lambda t: t.models.list_version_users(MODEL_ID, 1)),
    "a job": ({"jobs_pkey"}, lambda t: t.jobs.get(JOB_ID, lock=True)),
    "jobs": ({"jobs_pkey"}, lambda t: t.jobs.list(JobFilter(), Page(50, JOB_ID))),
    "jobs by state": ({"jobs_by_state"}, lambda t: t.jobs.list(JobFilter(state=JobState.FAILED), Page(5))),
    "jobs by kind": ({"jobs_by_kind"}, lambda t: t.jobs.list(JobFilter(kind=JobKind.RAG_INDEX), Page(5))),
    "jobs by model": ({"jobs_by_model"}, lambda t: t.jobs.list(JobFilter(model_id=MODEL_ID), Page(5))),
    "jobs of a base model": ({"jobs_by_kind"}, lambda t: _list_none(t, JobFilter(model_id="base7"))),
    "jobs that use a dataset": ({"jobs_active"}, lambda t: t.jobs.list_active(dataset_id=DATASET_ID)),
    "jobs that use a model": ({"jobs_active"}, lambda t: t.jobs.list_active(model_id=MODEL_ID)),
    "events": ({"job_events_pkey"}, lambda t: t.jobs.list_events(JOB_ID, 20, 10)),
    "steps": ({"job_events_by_step"}, lambda t: t.jobs.list_steps(JOB_ID, 10)),
    "attempts": ({"job_events_of_states", "job_events_pkey", "jobs_pkey"}, lambda t: t.jobs.list_attempts(RETRY_ID, None, 10)),
    "a retry": ({"jobs_by_retried"}, lambda t: t.jobs.find_retry(JOB_ID)),
    "speeds": ({"jobs_by_kind"}, lambda t: _list_speeds(t)),
    "checkpoints": ({"checkpoints_pkey"}, lambda t: t.jobs.list_checkpoints(JOB_ID)),
    "a dataset": ({"datasets_pkey"}, lambda t: t.datasets.get(DATASET_ID)),
    "datasets": ({"datasets_pkey"}, lambda t: t.datasets.list(Page(10, DATASET_ID))),
    "a document": ({"documents_pkey"}, lambda t: t.documents.get(MODEL_ID, DOCUMENT_ID)),
    "documents": ({"documents_pkey"}, lambda t: t.documents.list(MODEL_ID, Page(10, DOCUMENT_ID), DocumentState.INDEXED)),
    "a search by vectors": ({"chunk_vectors_pkey"}, lambda t: t.documents.search(MODEL_ID, _make_search(SearchMode.DENSE))),
    "a search by words": (
        {"chunk_terms_pkey", "chunk_terms_by_word", "term_counts_pkey"},
        lambda t: t.documents.search(MODEL_ID, _make_search(SearchMode.LEXICAL)),
    ),
    "a search by both": (
        {"chunk_vectors_pkey", "chunk_terms_pkey", "chunk_terms_by_word", "term_counts_pkey", "chunks_pkey"},
        lambda t: t.documents.search(MODEL_ID, _make_search(SearchMode.HYBRID)),
    ),
    "unknown keys of metadata": ({"documents_pkey"}, lambda t: t.documents.list_unknown_keys(MODEL_ID, ["nowhere"])),
    "documents that are given again": (
        {"documents_by_source", "documents_by_original", "documents_pkey", "staged_documents_pkey"},
        lambda t: t.staged.list_known(MODEL_ID, [NewDocument("x", source_uri="source5", document_id=DOCUMENT_ID)]),
    ),
    "what waits of a model": ({"staged_documents_pkey"}, lambda t: t.staged.is_any_waiting(MODEL_ID)),
    "a request": ({"requests_pkey"}, lambda t: t.requests.find("Create", "r7")),
}


@pytest.mark.parametrize("name", QUERIES)
async def test_a_query_of_the_api_uses_its_index(filled: PostgresDatabase, explained: Explained, name: str) -> None:
    indexes, call = QUERIES[name]
    async with filled.transaction(ORGANIZATION) as transaction:
        assert await call(transaction)
    assert indexes <= explained.indexes
    assert not explained.scanned_tables


WORK: dict[str, tuple[set[str], Callable[[PostgresJobQueue], Awaitable[object]]]] = {
    "a claim": ({"jobs_queued", "jobs_held"}, lambda queue: queue.claim("worker", LIMITS, 30)),
    "a heartbeat": ({"jobs_pkey"}, lambda queue: queue.heartbeat(LEASE, 86_400)),
    "reaping": ({"jobs_held"}, lambda queue: queue.reap(3)),
}


@pytest.mark.parametrize("name", WORK)
async def test_a_query_of_the_worker_uses_its_index(filled: PostgresDatabase, explained: Explained, name: str) -> None:
    indexes, call = WORK[name]
    await call(PostgresJobQueue(filled))
    assert indexes <= explained.indexes
    assert not explained.scanned_tables


async def test_pending_documents_are_read_by_their_index(filled: PostgresDatabase, explained: Explained) -> None:
    spec = SPEC.to_json(make_job(make_rag_model()).spec)
    async with filled.begin() as connection:
        await connection.execute(update(jobs).where(jobs.c.organization == ORGANIZATION, jobs.c.job_id == JOB_ID).values(spec=spec))
    explained.indexes.clear()
    assert len([document async for document in PostgresJobQueue(filled).read_pending_documents(LEASE)]) == 10
    assert {"staged_documents_pkey", "chunks_pkey"} <= explained.indexes
    assert not explained.scanned_tables


async def test_the_feed_looks_by_the_primary_key(filled: PostgresDatabase, explained: Explained) -> None:
    feed = PostgresJobFeed(filled)
    assert await feed.wait(ORGANIZATION, JOB_ID, 49, 5)
    await feed.close()
    assert explained.indexes == {"jobs_pkey"}
    assert not explained.scanned_tables
