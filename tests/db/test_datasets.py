"""Rows of datasets."""

import asyncio

import pytest

from server.db.database import PostgresDatabase
from server.domain.datasets import Dataset
from server.domain.errors import FailedPrecondition, NotFound
from server.domain.ids import DATASET, new_id
from server.domain.jobs import JobState
from server.services.ports import Page
from tests.db.samples import ORGANIZATION, add_dataset, add_job, add_model, change_state, make_job, read_job


async def _delete(database: PostgresDatabase, dataset: Dataset) -> None:
    async with database.transaction(ORGANIZATION) as transaction:
        await transaction.datasets.delete(dataset.dataset_id)


async def test_a_dataset_comes_back_as_it_was_stored(database: PostgresDatabase) -> None:
    dataset = await add_dataset(database)
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.datasets.get(dataset.dataset_id) == dataset


async def test_datasets_are_listed_newest_first_in_pages(database: PostgresDatabase) -> None:
    ids = sorted([(await add_dataset(database)).dataset_id for _ in range(5)], reverse=True)
    async with database.transaction(ORGANIZATION) as transaction:
        assert [dataset.dataset_id for dataset in await transaction.datasets.list(Page(3))] == ids[:3]
        assert [dataset.dataset_id for dataset in await transaction.datasets.list(Page(3, ids[2]))] == ids[3:]


@pytest.mark.parametrize("missing", [new_id(DATASET), "ds_", "nothing", "ds_\0"])
async def test_a_dataset_that_is_not_there_is_not_found(database: PostgresDatabase, missing: str) -> None:
    async with database.transaction(ORGANIZATION) as transaction:
        with pytest.raises(NotFound):
            await transaction.datasets.get(missing)
        with pytest.raises(NotFound):
            await transaction.datasets.delete(missing)


async def test_a_dataset_in_use_is_kept_and_one_whose_job_is_over_may_go(database: PostgresDatabase) -> None:
    dataset = await add_dataset(database)
    job = await add_job(database, dataset=dataset)
    with pytest.raises(FailedPrecondition):
        await _delete(database, dataset)
    await change_state(database, job.job_id, JobState.CANCELLED)
    await _delete(database, dataset)
    assert (await read_job(database, job.job_id)).spec == job.spec


async def test_a_job_cannot_begin_to_use_a_dataset_that_is_being_deleted(database: PostgresDatabase) -> None:
    dataset, model = await add_dataset(database), await add_model(database)
    async with database.transaction(ORGANIZATION) as deleting:
        await deleting.datasets.delete(dataset.dataset_id)
        late = asyncio.create_task(add_job(database, model, dataset=dataset))
        await asyncio.sleep(0.1)
        assert not late.done()
    with pytest.raises(NotFound):
        await late


async def test_a_dataset_cannot_be_deleted_while_a_job_is_being_added(database: PostgresDatabase) -> None:
    dataset, model = await add_dataset(database), await add_model(database)
    async with database.transaction(ORGANIZATION) as adding:
        await adding.jobs.insert(make_job(model, dataset))
        late = asyncio.create_task(_delete(database, dataset))
        await asyncio.sleep(0.1)
        assert not late.done()
    with pytest.raises(FailedPrecondition):
        await late
