"""A worker that lost its job can write nothing any more, by whatever method."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace

import psycopg
import pytest
from psycopg.rows import TupleRow
from psycopg.sql import SQL, Identifier

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.errors import ErrorData, LeaseLost
from server.domain.ids import DOCUMENT, new_id
from server.domain.jobs import FailureReason, JobState
from server.services.job_queue import Lease
from tests.db.samples import RESULT, claim, finish_job, make_checkpoint, make_chunks, make_step, make_vectors, start_job

Call = Callable[[PostgresJobQueue, Lease], Awaitable[object]]


async def _read(queue: PostgresJobQueue, lease: Lease) -> None:
    async for _ in queue.read_pending_documents(lease):
        pass


CALLS: dict[str, Call] = {
    "heartbeat": lambda queue, lease: queue.heartbeat(lease, 30),
    "append": lambda queue, lease: queue.append(lease, [make_step(1)]),
    "change_state": lambda queue, lease: queue.change_state(lease, JobState.FINALIZING, ""),
    "record_checkpoint": lambda queue, lease: queue.record_checkpoint(lease, make_checkpoint(5), 1),
    "read_pending_documents": _read,
    "commit_document": lambda queue, lease: queue.commit_document(
        lease, new_id(DOCUMENT), make_chunks(["a"]), make_vectors(1).tobytes(), 8, "", 1
    ),
    "complete": lambda queue, lease: queue.complete(lease, RESULT),
    "fail": lambda queue, lease: queue.fail(lease, FailureReason.OUT_OF_MEMORY, ErrorData("ABORTED", "OUT_OF_MEMORY", "too big")),
    "interrupt": lambda queue, lease: queue.interrupt(lease, "the child was killed", 3),
}


def _dump(sql: psycopg.Connection[TupleRow]) -> list[TupleRow]:
    tables = ("jobs", "job_events", "models", "model_versions", "checkpoints", "documents", "chunks")
    return [row for table in tables for row in sql.execute(SQL("TABLE {}").format(Identifier(table)))]


def test_every_method_under_a_lease_is_tested_here() -> None:
    methods = inspect.getmembers(PostgresJobQueue, inspect.isfunction)
    assert set(CALLS) == {name for name, method in methods if "lease" in inspect.signature(method).parameters}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("loss", ["taken over", "another organization", "in the queue again", "finished", "deleted"])
async def test_a_worker_without_the_lease_changes_nothing(
    database: PostgresDatabase, queue: PostgresJobQueue, sql: psycopg.Connection[TupleRow], name: str, loss: str
) -> None:
    lease = await start_job(database, queue)
    stale = lease
    if loss == "another organization":
        stale = replace(lease, organization="other")
    elif loss == "finished":
        await finish_job(queue, lease)
    elif loss == "deleted":
        sql.execute("DELETE FROM jobs")
    else:
        await queue.interrupt(lease, "the worker was thought dead", 3)
    if loss == "taken over":
        again = await claim(queue)
        await queue.change_state(again.lease, JobState.RUNNING, "")
        assert again.lease.job_id == stale.job_id
    before = _dump(sql)
    with pytest.raises(LeaseLost):
        await CALLS[name](queue, stale)
    assert _dump(sql) == before


async def test_an_overdue_worker_that_nobody_replaced_goes_on(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    lease = await start_job(database, queue)
    await queue.heartbeat(lease, -1)
    await queue.append(lease, [make_step(1)])
    assert await queue.heartbeat(lease, 30) is JobState.RUNNING
    assert await queue.reap(3) == []
