"""What the tests of the database share."""

from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from psycopg.rows import TupleRow

from server.db.database import PostgresDatabase
from server.db.feed import PostgresJobFeed
from server.db.queue import PostgresJobQueue


@pytest.fixture
def queue(database: PostgresDatabase) -> PostgresJobQueue:
    """A queue on the test's database."""
    return PostgresJobQueue(database)


@pytest.fixture
async def feed(database: PostgresDatabase) -> AsyncIterator[PostgresJobFeed]:
    """A feed on the test's database."""
    feed = PostgresJobFeed(database)
    yield feed
    await feed.close()


@pytest.fixture
def sql(database_url: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """A plain connection, for looking and for breaking things."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection
