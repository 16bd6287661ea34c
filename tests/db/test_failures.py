"""What PostgreSQL says reaches a caller as an error with a meaning, and nothing stays behind."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import psycopg
import pytest
from psycopg.rows import TupleRow
from sqlalchemy import text

from server.childprocess import explain_failure
from server.db.database import PostgresDatabase, PostgresTransaction
from server.domain.documents import NewDocument
from server.domain.errors import InvalidInput, NotFound, ResourceExhausted, Unavailable
from server.domain.ids import DOCUMENT, new_id
from server.domain.jobs import FailureReason
from server.domain.models import Model
from server.services.ports import IssuedRequest, JobFilter, ModelFilter, Page
from tests.db.samples import ORGANIZATION, add_dataset, add_model, make_dataset, make_job, make_model, make_rag_model, read_model

Call = Callable[[PostgresTransaction, Model, str], Awaitable[object]]


CALLS: dict[str, Call] = {
    "models.insert": lambda mine, rag, bad: mine.models.insert(replace(make_model(), display_name=bad)),
    "labels": lambda mine, rag, bad: mine.models.insert(replace(make_model(), labels={"key": bad})),
    "models.save": lambda mine, rag, bad: mine.models.save(replace(rag, description=bad)),
    "models.list": lambda mine, rag, bad: mine.models.list(ModelFilter(base_model=bad), Page(5)),
    "before_id": lambda mine, rag, bad: mine.jobs.list(JobFilter(), Page(5, bad)),
    "state_reason": lambda mine, rag, bad: mine.jobs.insert(replace(make_job(rag), state_reason=bad)),
    "datasets.insert": lambda mine, rag, bad: mine.datasets.insert(replace(make_dataset(), display_name=bad)),
    "document": lambda mine, rag, bad: mine.documents.insert(rag.model_id, [(new_id(DOCUMENT), NewDocument(bad))]),
    "metadata": lambda mine, rag, bad: mine.documents.insert(rag.model_id, [(new_id(DOCUMENT), NewDocument("a", metadata={"k": bad}))]),
    "requests.find": lambda mine, rag, bad: mine.requests.find("Create", bad),
    "requests.insert": lambda mine, rag, bad: mine.requests.insert("Create", bad, IssuedRequest("f", {})),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", ["a\0b", "a\ud800b", "\udfff"])
async def test_a_text_that_cannot_be_stored_is_refused(database: PostgresDatabase, name: str, bad: str) -> None:
    rag = await add_model(database, make_rag_model())
    with pytest.raises(InvalidInput) as caught:
        async with database.transaction(ORGANIZATION) as transaction:
            await CALLS[name](transaction, rag, bad)
    assert caught.value.reason == "VALUE_NOT_STORABLE"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
async def test_a_number_that_json_does_not_have_is_refused(database: PostgresDatabase, number: float) -> None:
    rag = await add_model(database, make_rag_model())
    with pytest.raises(InvalidInput):
        async with database.transaction(ORGANIZATION) as transaction:
            await transaction.documents.insert(rag.model_id, [(new_id(DOCUMENT), NewDocument("text", metadata={"weight": number}))])


async def test_a_transaction_that_fails_leaves_nothing(database: PostgresDatabase) -> None:
    model = make_model()

    async def insert_both() -> None:
        async with database.transaction(ORGANIZATION) as transaction:
            await transaction.models.insert(model)
            await transaction.jobs.insert(make_job(make_model()))

    with pytest.raises(NotFound):
        await insert_both()
    with pytest.raises(NotFound):
        await read_model(database, model.model_id)


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    database = PostgresDatabase("postgresql://ann:secret@127.0.0.1:1/training")
    with pytest.raises(Unavailable) as caught:
        await add_dataset(database)
    assert caught.value.data.retry_after_seconds
    assert "secret" not in str(caught.value)
    await database.close()


async def test_a_connection_that_breaks_is_unavailable_and_the_next_request_is_served(
    database: PostgresDatabase, sql: psycopg.Connection[TupleRow]
) -> None:
    model = await add_model(database)
    # A connection is ended when its process is gone: each is waited for.
    end_all = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"

    async def read_while_it_breaks() -> None:
        async with database.transaction(ORGANIZATION) as transaction:
            await transaction.models.get(model.model_id)
            sql.execute(end_all)
            await transaction.models.get(model.model_id)

    with pytest.raises(Unavailable):
        await read_while_it_breaks()
    assert await read_model(database, model.model_id) == model
    sql.execute(end_all)
    assert await read_model(database, model.model_id) == model


async def test_a_statement_that_takes_too_long_is_unavailable(database: PostgresDatabase) -> None:
    async with database.begin() as connection:
        await connection.execute(text("SET statement_timeout = 20"))
    with pytest.raises(Unavailable, match="busy"):
        async with database.begin() as connection:
            await connection.execute(text("SELECT pg_sleep(5)"))


async def test_a_pool_in_use_makes_others_wait_their_turn(database_url: str) -> None:
    database = PostgresDatabase(database_url, pool_size=2)
    models = await asyncio.gather(*(add_model(database) for _ in range(20)))
    assert len({model.model_id for model in models}) == 20
    await database.close()


async def test_a_fault_of_ours_stays_what_it_is(database: PostgresDatabase) -> None:
    with pytest.raises(Exception, match="no_such_column") as caught:
        async with database.begin() as connection:
            await connection.execute(text("SELECT no_such_column FROM models"))
    assert not isinstance(caught.value, InvalidInput | Unavailable)


async def test_a_full_disk_is_told_from_a_database_that_is_away(database: PostgresDatabase) -> None:
    with pytest.raises(ResourceExhausted) as caught:
        async with database.begin() as connection:
            await connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$"))
    assert caught.value.reason == "DISK_FULL"
    failure = explain_failure(caught.value)
    assert failure is not None
    assert failure.reason is FailureReason.DISK_FULL
