"""Versions of models: numbered once, listed in pages with their exports, gone with all of theirs, and who still needs one."""

from dataclasses import replace

import pytest

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from server.domain.errors import FailedPrecondition, NotFound
from server.domain.jobs import JobState
from server.domain.models import Model
from server.domain.specs import ExportFormat, FineTuneSpec, VersionReference
from server.domain.techniques import TechniqueFamily
from tests.db.samples import (
    ORGANIZATION,
    RESULT,
    add_model,
    change_state,
    claim,
    finish_job,
    make_export,
    make_job,
    make_model,
    read_model,
    start_job,
)


async def make_versions(database: PostgresDatabase, queue: PostgresJobQueue, count: int) -> Model:
    model = await add_model(database)
    for _ in range(count):
        await finish_job(queue, await start_job(database, queue, model))
    return await read_model(database, model.model_id)


async def export(database: PostgresDatabase, queue: PostgresJobQueue, model: Model, version: int, form: ExportFormat) -> str:
    job = make_export(model, version, form)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.jobs.insert(job)
    lease = (await claim(queue)).lease
    await queue.change_state(lease, JobState.RUNNING, "")
    await finish_job(queue, lease)
    return job.job_id


async def test_versions_come_in_pages_newest_first_with_their_exports(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await make_versions(database, queue, 3)
    jobs = [await export(database, queue, model, 2, form) for form in ExportFormat]
    async with database.transaction(ORGANIZATION) as transaction:
        first = await transaction.models.list_versions(model.model_id, 2)
        rest = await transaction.models.list_versions(model.model_id, 2, before=2)
        second = await transaction.models.get_version(model.model_id, 2)
    assert [version.version for version in (*first, *rest)] == [3, 2, 1]
    assert [version.exports for version in (first[0], rest[0])] == [(), ()]
    assert first[1] == second
    assert [(made.format, made.job_id, made.size_bytes) for made in second.exports] == [
        (form, job, RESULT.size_bytes) for form, job in zip(ExportFormat, jobs, strict=True)
    ]
    assert (await read_model(database, model.model_id)).serving_version == 3


async def test_an_export_made_again_replaces_the_first(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await make_versions(database, queue, 1)
    await export(database, queue, model, 1, ExportFormat.MERGED)
    again = await export(database, queue, model, 1, ExportFormat.MERGED)
    async with database.transaction(ORGANIZATION) as transaction:
        (made,) = (await transaction.models.get_version(model.model_id, 1)).exports
    assert made.job_id == again


async def test_a_number_is_never_given_to_a_second_version(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await make_versions(database, queue, 2)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.models.save(replace(model, serving_version=1))
        await transaction.models.delete_version(model.model_id, 2)
    await finish_job(queue, await start_job(database, queue, model))
    async with database.transaction(ORGANIZATION) as transaction:
        assert [version.version for version in await transaction.models.list_versions(model.model_id, 10)] == [3, 1]


async def test_a_deleted_version_takes_its_exports_and_leaves_the_others(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await make_versions(database, queue, 2)
    await export(database, queue, model, 1, ExportFormat.MERGED)
    await export(database, queue, model, 2, ExportFormat.MERGED)
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.models.delete_version(model.model_id, 1)
        with pytest.raises(NotFound):
            await transaction.models.delete_version(model.model_id, 1)
    async with database.transaction(ORGANIZATION) as transaction:
        (left,) = await transaction.models.list_versions(model.model_id, 10)
    assert (left.version, len(left.exports)) == (2, 1)
    # And the worker's sweep no longer knows it.
    assert len([path for path in await queue.list_live_directories() if path == RESULT.artifact_path]) == 1


async def test_a_version_is_used_by_its_export_and_by_who_starts_from_it_until_they_end(
    database: PostgresDatabase, queue: PostgresJobQueue
) -> None:
    model = await make_versions(database, queue, 2)
    other = await add_model(database)
    exporting = make_export(model, 1)
    starting = make_job(other)
    assert isinstance(starting.spec, FineTuneSpec)
    starting = replace(starting, spec=replace(starting.spec, warm_start_from=VersionReference(model.model_id, 1)))
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.jobs.insert(exporting)
        await transaction.jobs.insert(starting)
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.models.list_version_users(model.model_id, 1) == sorted([exporting.job_id, starting.job_id])
        assert await transaction.models.list_version_users(model.model_id, 2) == []
        assert await transaction.models.list_version_users(other.model_id, 1) == []
        assert set(await transaction.jobs.list_active(model_id=model.model_id)) == {exporting.job_id, starting.job_id}
    await change_state(database, exporting.job_id, JobState.CANCELLED)
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.jobs.list_active(model_id=model.model_id) == [starting.job_id]
        with pytest.raises(FailedPrecondition):
            await transaction.models.delete(model.model_id)
    await change_state(database, starting.job_id, JobState.CANCELLED)
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.models.list_version_users(model.model_id, 1) == []


async def test_the_model_shows_how_the_version_that_serves_was_trained(database: PostgresDatabase, queue: PostgresJobQueue) -> None:
    model = await add_model(database, replace(make_model(), technique="FULL"))
    await finish_job(queue, await start_job(database, queue, model))
    assert (await read_model(database, model.model_id)).technique == TechniqueFamily.LORA
    async with database.transaction(ORGANIZATION) as transaction:
        assert (await transaction.models.get_version(model.model_id, 1)).spec is not None
