"""Rows of models and their versions."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.errors import ErrorData, FailedPrecondition, FieldViolation, NotFound
from server.domain.ids import MODEL, new_id
from server.domain.jobs import JobState
from server.domain.models import ModelState, ModelType
from server.domain.rag_indexes import IndexState
from server.services.ports import ModelFilter, Page
from tests.db.samples import (
    BASE_MODEL,
    ORGANIZATION,
    add_documents,
    add_job,
    add_model,
    change_state,
    finish_job,
    make_model,
    make_rag_model,
    read_log,
    read_model,
    start_job,
)

ERROR = ErrorData("ABORTED", "X", "why", {"step": "3"}, [FieldViolation("a", "b")], 1.5)


async def test_a_model_comes_back_as_it_was_stored(database: PostgresDatabase) -> None:
    for model in (make_model(), replace(make_rag_model(), description="سطر", error=ERROR)):
        await add_model(database, model)
        stored = await read_model(database, model.model_id)
        assert replace(stored, rag=stored.rag and replace(stored.rag, index=None)) == model


async def test_a_rag_model_begins_with_its_first_index(database: PostgresDatabase) -> None:
    model = await add_model(database, make_rag_model())
    stored = await read_model(database, model.model_id)
    assert model.rag is not None
    assert stored.rag is not None
    index = stored.rag.index
    assert index is not None
    assert (index.index_number, index.state, index.dimension) == (1, IndexState.BUILDING, None)
    assert (index.embedding_model, index.chunking) == (model.rag.embedding_model, model.rag.chunking)


async def test_saving_writes_what_may_change_and_nothing_else(database: PostgresDatabase) -> None:
    model = await add_model(database)
    changed = replace(model, display_name="New", description="d", labels={"a": "b"}, state=ModelState.READY, serving_version=3, error=ERROR)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.models.save(replace(changed, base_model="another", create_time=datetime.now(UTC)))
    saved = await read_model(database, model.model_id)
    assert replace(saved, update_time=changed.update_time) == changed
    assert saved.update_time > model.update_time


async def test_saving_a_model_that_is_gone_is_not_found(database: PostgresDatabase) -> None:
    async with database.transaction(ORGANIZATION) as transaction:
        with pytest.raises(NotFound):
            await transaction.models.save(make_model())


async def test_counts_are_those_of_the_rows(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    rag = await add_model(database, make_rag_model())
    await add_documents(database, rag, ["one", "two", "three"])
    lease = await start_job(database, queue)
    await finish_job(queue, lease)
    async with database.transaction(ORGANIZATION) as transaction:
        counts = {
            model.type: (model.version_count, model.document_count) for model in await transaction.models.list(ModelFilter(), Page(10))
        }
    assert counts == {ModelType.RAG: (0, 3), ModelType.FINE_TUNED: (1, 0)}


async def test_filters_choose_models(database: PostgresDatabase) -> None:
    tuned, rag = make_model(), make_rag_model()
    ready = replace(make_model(), state=ModelState.READY, base_model="other/base")
    for model in (tuned, rag, ready):
        await add_model(database, model)

    async def find(where: ModelFilter) -> set[str]:
        async with database.transaction(ORGANIZATION) as transaction:
            return {model.model_id for model in await transaction.models.list(where, Page(10))}

    assert await find(ModelFilter()) == {tuned.model_id, rag.model_id, ready.model_id}
    assert await find(ModelFilter(type=ModelType.RAG)) == {rag.model_id}
    assert await find(ModelFilter(state=ModelState.READY)) == {ready.model_id}
    assert await find(ModelFilter(base_model=BASE_MODEL, type=ModelType.FINE_TUNED)) == {tuned.model_id}


async def test_pages_are_newest_first_and_stable_while_models_are_added(database: PostgresDatabase) -> None:
    ids = [(await add_model(database)).model_id for _ in range(7)]
    seen: list[str] = []
    before = None
    while len(seen) < 7:
        async with database.transaction(ORGANIZATION) as transaction:
            page = await transaction.models.list(ModelFilter(), Page(3, before))
        assert page
        seen += [model.model_id for model in page]
        before = seen[-1]
        await add_model(database)
    assert seen == sorted(ids, reverse=True)


async def test_a_locked_model_is_changed_by_one_at_a_time(database: PostgresDatabase) -> None:
    model = await add_model(database)

    async def add_word() -> None:
        async with database.transaction(ORGANIZATION) as transaction:
            mine = await transaction.models.get(model.model_id, lock=True)
            await transaction.models.save(replace(mine, description=mine.description + "x"))

    await asyncio.gather(*(add_word() for _ in range(8)))
    assert (await read_model(database, model.model_id)).description == "x" * 8


async def test_deleting_a_model_takes_all_that_belongs_to_it(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await finish_job(queue, lease)
    model = (await read_model(database, (await _model_of(database, lease.job_id)))).model_id
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.models.delete(model)
    async with database.transaction(ORGANIZATION) as transaction:
        for missing in (transaction.models.get(model), transaction.jobs.get(lease.job_id), transaction.models.get_version(model, 1)):
            with pytest.raises(NotFound):
                await missing
    assert await read_log(database, lease.job_id) == []


async def _model_of(database: PostgresDatabase, job_id: str) -> str:
    async with database.transaction(ORGANIZATION) as transaction:
        return (await transaction.jobs.get(job_id)).model_id


async def test_deleting_a_model_with_an_unfinished_job_is_refused(database: PostgresDatabase) -> None:
    job = await add_job(database)
    with pytest.raises(FailedPrecondition) as caught:
        async with database.transaction(ORGANIZATION) as transaction:
            await transaction.models.delete(job.model_id)
    assert caught.value.reason == "MODEL_IN_USE"
    await change_state(database, job.job_id, JobState.CANCELLED)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.models.delete(job.model_id)


async def test_deleting_a_generator_in_use_is_refused(database: PostgresDatabase) -> None:
    generator = await add_model(database)
    user = await add_model(database, make_rag_model(generator.model_id))
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.models.list_users(generator.model_id) == [user.model_id]
        assert await transaction.models.list_users(BASE_MODEL) == []
    with pytest.raises(FailedPrecondition):
        async with database.transaction(ORGANIZATION) as transaction:
            await transaction.models.delete(generator.model_id)


async def test_a_model_cannot_begin_to_use_a_generator_that_is_being_deleted(database: PostgresDatabase) -> None:
    generator = await add_model(database)
    async with database.transaction(ORGANIZATION) as deleting:
        await deleting.models.delete(generator.model_id)
        late = asyncio.create_task(add_model(database, make_rag_model(generator.model_id)))
        await asyncio.sleep(0.1)
        assert not late.done()
    with pytest.raises(NotFound):
        await late


@pytest.mark.parametrize(
    "wrong", ["", "mdl_", "../../etc", "mdl_" + "x" * 23, "job_" + "0" * 24, BASE_MODEL, "mdl_" + "0" * 23 + "\0", "\ud800"]
)
async def test_what_is_no_id_is_not_found(database: PostgresDatabase, wrong: str) -> None:
    async with database.transaction(ORGANIZATION) as transaction:
        for missing in (transaction.models.get(wrong), transaction.models.delete(wrong), transaction.models.get_version(wrong, 1)):
            with pytest.raises(NotFound):
                await missing
        with pytest.raises(NotFound):
            await transaction.models.delete_version(wrong, 1)
        assert await transaction.models.list_versions(wrong, 10) == []
        assert await transaction.models.list_version_users(wrong, 1) == []
        assert await transaction.models.list_users(wrong) == []


@pytest.mark.parametrize("version", [-1, 0, 2, 2**31, 2**70])
async def test_a_version_that_is_not_there_is_not_found(database: PostgresDatabase, version: int) -> None:
    model = await add_model(database)
    async with database.transaction(ORGANIZATION) as transaction:
        with pytest.raises(NotFound):
            await transaction.models.get_version(model.model_id, version)
        with pytest.raises(NotFound):
            await transaction.models.delete(new_id(MODEL))
