"""What belongs to one organization does not exist for another, by whatever method it is asked for."""

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from server.db.database import PostgresDatabase, PostgresTransaction
from server.db.queue import PostgresJobQueue
from server.domain.documents import NewDocument
from server.domain.errors import NotFound
from server.domain.ids import DOCUMENT, new_id
from server.domain.jobs import Job, JobState
from server.domain.models import Model
from server.domain.retrieval import FIRST_INDEX, Chunking, RetrievalSettings, Search, SearchMode
from server.domain.retrieval_evaluation import Span
from server.domain.specs import IndexSpec
from server.services.lexical.analysis import analyse_query
from server.services.ports import IssuedRequest, JobFilter, ModelFilter, Page
from tests.db.samples import (
    ORGANIZATION,
    add_dataset,
    add_documents,
    add_job,
    add_model,
    add_retry,
    finish_job,
    make_batch,
    make_chunks,
    make_evaluation,
    make_export,
    make_job,
    make_model,
    make_rag_model,
    make_step,
    make_vectors,
    read_job,
    read_model,
    start_job,
)


@dataclass(frozen=True)
class Theirs:
    """What the first organization has."""

    tuned: Model
    rag: Model
    job: Job
    waiting: Job
    failed: Job
    retry: Job
    dataset_id: str
    document_id: str
    batch_job_id: str


Call = Callable[[PostgresTransaction, Theirs], Awaitable[object]]
REQUEST = IssuedRequest("f" * 64, {"model_id": "mdl_1"})


async def _find_quotes(mine: PostgresTransaction, theirs: Theirs) -> Sequence[Span]:
    (places,) = await mine.documents.find_quotes(theirs.rag.model_id, FIRST_INDEX, [("", "theirs")])
    return places


CALLS: dict[str, Call] = {
    "models.get": lambda mine, theirs: mine.models.get(theirs.tuned.model_id, lock=True),
    "models.read_rag": lambda mine, theirs: mine.models.read_rag(theirs.rag.model_id),
    "models.list": lambda mine, theirs: mine.models.list(ModelFilter(), Page(10)),
    "models.save": lambda mine, theirs: mine.models.save(replace(theirs.tuned, display_name="taken")),
    "models.delete": lambda mine, theirs: mine.models.delete(theirs.tuned.model_id),
    "models.add_index": lambda mine, theirs: mine.models.add_index(theirs.rag.model_id, "e", Chunking()),
    "models.list_users": lambda mine, theirs: mine.models.list_users(theirs.tuned.model_id),
    "models.get_version": lambda mine, theirs: mine.models.get_version(theirs.tuned.model_id, 1),
    "models.list_versions": lambda mine, theirs: mine.models.list_versions(theirs.tuned.model_id, 10),
    "models.list_version_users": lambda mine, theirs: mine.models.list_version_users(theirs.tuned.model_id, 1),
    "models.delete_version": lambda mine, theirs: mine.models.delete_version(theirs.tuned.model_id, 1),
    "models.insert": lambda mine, theirs: mine.models.insert(make_rag_model(theirs.tuned.model_id)),
    "jobs.get": lambda mine, theirs: mine.jobs.get(theirs.job.job_id, lock=True),
    "jobs.list": lambda mine, theirs: mine.jobs.list(JobFilter(), Page(10)),
    "jobs.change_state": lambda mine, theirs: mine.jobs.change_state(theirs.waiting.job_id, JobState.CANCELLED, ""),
    "jobs.list_active": lambda mine, theirs: mine.jobs.list_active(model_id=theirs.waiting.model_id, dataset_id=theirs.dataset_id),
    "jobs.list_events": lambda mine, theirs: mine.jobs.list_events(theirs.job.job_id, 0, 100),
    "jobs.list_steps": lambda mine, theirs: mine.jobs.list_steps(theirs.job.job_id, 100),
    "jobs.list_evaluations": lambda mine, theirs: mine.jobs.list_evaluations(theirs.job.job_id, 100),
    "jobs.list_checkpoints": lambda mine, theirs: mine.jobs.list_checkpoints(theirs.retry.job_id),
    "jobs.list_attempts": lambda mine, theirs: mine.jobs.list_attempts(theirs.retry.job_id, None, 10),
    "jobs.list_speeds": lambda mine, theirs: mine.jobs.list_speeds(10),
    "jobs.find_reindex": lambda mine, theirs: mine.jobs.find_reindex(theirs.rag.model_id),
    "jobs.find_retry": lambda mine, theirs: mine.jobs.find_retry(theirs.failed.job_id),
    "jobs.find_queued": lambda mine, theirs: mine.jobs.find_queued(theirs.waiting.model_id, theirs.waiting.spec),
    "jobs.get_result": lambda mine, theirs: mine.jobs.get_result(theirs.batch_job_id),
    "jobs.list_result_paths": lambda mine, theirs: mine.jobs.list_result_paths(theirs.tuned.model_id),
    "jobs.resume": lambda mine, theirs: mine.jobs.resume(theirs.waiting.job_id),
    "jobs.insert": lambda mine, theirs: mine.jobs.insert(make_job(theirs.tuned)),
    "datasets.get": lambda mine, theirs: mine.datasets.get(theirs.dataset_id),
    "datasets.list": lambda mine, theirs: mine.datasets.list(Page(10)),
    "datasets.delete": lambda mine, theirs: mine.datasets.delete(theirs.dataset_id),
    "documents.insert": lambda mine, theirs: mine.documents.insert(theirs.rag.model_id, [(new_id(DOCUMENT), NewDocument("mine"))]),
    "documents.get": lambda mine, theirs: mine.documents.get(theirs.rag.model_id, theirs.document_id),
    "documents.list": lambda mine, theirs: mine.documents.list(theirs.rag.model_id, Page(10)),
    "documents.get_text": lambda mine, theirs: mine.documents.get_text(theirs.rag.model_id, theirs.document_id),
    "documents.get_original": lambda mine, theirs: mine.documents.get_original(theirs.rag.model_id, theirs.document_id),
    "documents.read_sizes": lambda mine, theirs: mine.documents.read_sizes(theirs.rag.model_id, [theirs.document_id]),
    "documents.find_quotes": _find_quotes,
    "documents.delete": lambda mine, theirs: mine.documents.delete(theirs.rag.model_id, theirs.document_id),
    "documents.search": lambda mine, theirs: mine.documents.search(
        theirs.rag.model_id,
        Search(RetrievalSettings(10, -1.0, SearchMode.HYBRID), [1.0] * 8, analyse_query("theirs")),
    ),
    "documents.list_unknown_keys": lambda mine, theirs: mine.documents.list_unknown_keys(theirs.rag.model_id, ["nowhere"]),
    "staged.list_known": lambda mine, theirs: mine.staged.list_known(theirs.rag.model_id, [NewDocument("theirs")]),
    "staged.stage": lambda mine, theirs: mine.staged.stage(theirs.rag.model_id, theirs.document_id, NewDocument("mine"), "job"),
    "staged.describe": lambda mine, theirs: mine.staged.describe(theirs.rag.model_id, theirs.document_id, NewDocument(title="mine")),
    "staged.is_any_waiting": lambda mine, theirs: mine.staged.is_any_waiting(theirs.rag.model_id),
    "requests.find": lambda mine, theirs: mine.requests.find("Create", "r1"),
}
# These add rows of one's own and read nothing.
ADDING = {"datasets.insert", "requests.insert"}


async def _prepare(database: PostgresDatabase, queue: PostgresJobQueue) -> Theirs:
    dataset = await add_dataset(database)
    rag = await add_model(database, make_rag_model())
    (document_id,) = await add_documents(database, rag, ["theirs"])
    index = await start_job(database, queue, rag)
    await queue.commit_document(index, document_id, make_chunks(["theirs"]), make_vectors(1).tobytes(), 8, "", 1)
    lease = await start_job(database, queue)
    await queue.append(lease, [make_step(1), make_evaluation(1, 2.0)])
    await finish_job(queue, lease)
    job = await read_job(database, lease.job_id)
    tuned = await read_model(database, job.model_id)
    batch = await start_job(database, queue, job=make_batch(dataset, tuned))
    await finish_job(queue, batch)
    failed, retry = await add_retry(database, queue)
    waiting = await add_job(database, dataset=dataset)
    await add_job(database, job=replace(make_job(rag), spec=IndexSpec("e", Chunking(), 2, is_reindex=True)))
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.requests.insert("Create", "r1", REQUEST)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.jobs.insert(make_export(tuned))
    rag = await read_model(database, rag.model_id)
    return Theirs(tuned, rag, job, waiting, failed, retry, dataset.dataset_id, document_id, batch.job_id)


def test_every_method_of_every_repository_is_tested_here() -> None:
    repositories = vars(PostgresTransaction(None, ""))  # type: ignore[arg-type]
    methods = {
        f"{name}.{method}"
        for name, repository in repositories.items()
        for method, _ in inspect.getmembers(repository, inspect.iscoroutinefunction)
        if not method.startswith("_")
    }
    assert methods == CALLS.keys() | ADDING


async def test_another_organization_sees_and_changes_nothing(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    theirs = await _prepare(database, queue)
    for name, call in CALLS.items():
        try:
            async with database.transaction("other") as transaction:
                answer = await call(transaction, theirs)
        except NotFound:
            continue
        assert not answer, name
    assert await read_model(database, theirs.tuned.model_id) == theirs.tuned
    assert await read_model(database, theirs.rag.model_id) == theirs.rag
    assert (await read_job(database, theirs.waiting.job_id)).state is JobState.QUEUED


async def test_its_own_organization_sees_it_all(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    theirs = await _prepare(database, queue)
    users = await add_model(database, make_rag_model(theirs.tuned.model_id))
    for name in sorted(name for name in CALLS if name.partition(".")[2].startswith(("get", "list", "search", "find"))):
        async with database.transaction(ORGANIZATION) as transaction:
            assert await CALLS[name](transaction, theirs), name
    assert users.rag is not None


async def test_two_organizations_may_use_the_same_ids(database: PostgresDatabase) -> None:
    model = make_model()
    for organization in (ORGANIZATION, "other"):
        await add_model(database, model, organization)
    async with database.transaction("other") as transaction:
        await transaction.models.delete(model.model_id)
    assert await read_model(database, model.model_id) == model
    with pytest.raises(NotFound):
        async with database.transaction("other") as transaction:
            await transaction.models.get(model.model_id)
