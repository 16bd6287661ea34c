"""Repeated creations: two at once cannot both find nothing."""

import asyncio

from server.db.database import PostgresDatabase
from server.services.ports import IssuedRequest
from tests.db.samples import ORGANIZATION

ISSUED = IssuedRequest("f" * 64, {"model_id": "mdl_1", "job_id": "job_1"})


async def test_a_request_is_remembered_by_method_and_id(database: PostgresDatabase) -> None:
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.requests.find("Create", "r1") is None
        await transaction.requests.insert("Create", "r1", ISSUED)
    async with database.transaction(ORGANIZATION) as transaction:
        assert await transaction.requests.find("Create", "r1") == ISSUED
        assert await transaction.requests.find("Create", "r2") is None
        assert await transaction.requests.find("Upload", "r1") is None
    async with database.transaction("other") as transaction:
        assert await transaction.requests.find("Create", "r1") is None


async def test_of_many_at_once_one_creates_and_the_others_see_it(database: PostgresDatabase) -> None:
    created = []

    async def create(number: int) -> str:
        async with database.transaction(ORGANIZATION) as transaction:
            if issued := await transaction.requests.find("Create", "same"):
                return issued.resource_ids["model_id"]
            await asyncio.sleep(0.02)
            created.append(number)
            await transaction.requests.insert("Create", "same", IssuedRequest("f", {"model_id": str(number)}))
            return str(number)

    answers = await asyncio.gather(*(create(number) for number in range(8)))
    assert len(created) == 1
    assert set(answers) == {str(created[0])}


async def test_a_creation_that_was_rolled_back_is_not_remembered(database: PostgresDatabase) -> None:
    try:
        async with database.transaction(ORGANIZATION) as transaction:
            await transaction.requests.insert("Create", "r1", ISSUED)
            raise KeyError("the creation fails")
    except KeyError:
        async with database.transaction(ORGANIZATION) as transaction:
            assert await transaction.requests.find("Create", "r1") is None
