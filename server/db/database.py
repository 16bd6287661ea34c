"""The connection pool, and units of work on it."""

import json
import select
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from server.db.address import parse_database_url
from server.db.datasets import PostgresDatasets
from server.db.documents import PostgresDocuments
from server.db.failures import ValueNotStorable, translate_failure
from server.db.jobs import PostgresJobs
from server.db.models import PostgresModels
from server.db.requests import PostgresRequests
from server.db.staging import PostgresStagedDocuments
from server.services.ports import Datasets, Documents, Jobs, Models, Requests, StagedDocuments

DEFAULT_POOL_SIZE = 10
POOL_TIMEOUT_SECONDS = 10.0
CONNECT_TIMEOUT_SECONDS = 10
# What no healthy statement or transaction of ours comes near: a stuck one must not hold locks for ever.
STATEMENT_TIMEOUT_SECONDS = 60
LOCK_TIMEOUT_SECONDS = 20
IDLE_TRANSACTION_TIMEOUT_SECONDS = 300
CONNECTION_OPTIONS = (
    f"-c timezone=UTC -c statement_timeout={STATEMENT_TIMEOUT_SECONDS}s -c lock_timeout={LOCK_TIMEOUT_SECONDS}s"
    f" -c idle_in_transaction_session_timeout={IDLE_TRANSACTION_TIMEOUT_SECONDS}s"
    # No statement of ours runs so long that compiling it would pay, and a search takes less time than that.
    " -c jit=off"
    # Nor so long that starting other processes for it would: a search would start them for the half of its plan that does not run.
    " -c max_parallel_workers_per_gather=0"
    # Keys that a search looks up come once each: remembering what was found under them copies vectors for nothing.
    " -c enable_memoize=off"
    # Scans of HNSW indexes. Set as a connection begins (pgvector takes them over when it is loaded) they cost a search no round trip.
    # Candidates that are kept while the nearest are looked for: the more, the fewer are missed; pgvector's 40 misses 5 % and more.
    " -c hnsw.ef_search=200"
    # With a filter the scan goes on until enough rows have passed, or so many were looked at, in so many times work_mem.
    " -c hnsw.iterative_scan=relaxed_order -c hnsw.max_scan_tuples=100000 -c hnsw.scan_mem_multiplier=16"
)


class PostgresTransaction:
    """The repositories of one organization on one open transaction."""

    def __init__(self, connection: AsyncConnection, organization: str) -> None:
        self.models: Models = PostgresModels(connection, organization)
        self.jobs: Jobs = PostgresJobs(connection, organization)
        self.datasets: Datasets = PostgresDatasets(connection, organization)
        self.documents: Documents = PostgresDocuments(connection, organization)
        self.staged: StagedDocuments = PostgresStagedDocuments(connection, organization)
        self.requests: Requests = PostgresRequests(connection, organization)


class PostgresDatabase:
    """A pool of connections to one database. Connects at first use; `close` it at the end."""

    def __init__(self, database_url: str, *, pool_size: int = DEFAULT_POOL_SIZE, application_name: str = "model-training") -> None:
        """Take `database_url` in any form that `parse_database_url` reads. Raises ValueError."""
        self._url = parse_database_url(database_url)
        self._engine = create_async_engine(
            self._url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT_SECONDS,
            # The connection that was used last has its statements prepared and its caches warm.
            pool_use_lifo=True,
            json_serializer=_write_json,
            connect_args={"options": CONNECTION_OPTIONS, "application_name": application_name, "connect_timeout": CONNECT_TIMEOUT_SECONDS},
        )
        event.listen(self._engine.sync_engine, "checkout", _refuse_ended)
        self._reader = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction over all organizations, for the queue. What PostgreSQL says arrives as ServiceError."""
        with _translated():
            async with self._engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self, organization: str) -> AsyncIterator[PostgresTransaction]:
        """Open a unit of work of one organization: committed when its block ends well, else rolled back."""
        async with self.begin() as connection:
            yield PostgresTransaction(connection, organization)

    @asynccontextmanager
    async def reading(self, organization: str) -> AsyncIterator[PostgresTransaction]:
        """Give the same repositories for reading, each query by itself: without the round trips that begin and end a transaction."""
        with _translated():
            async with self._reader.connect() as connection:
                yield PostgresTransaction(connection, organization)

    @property
    def connection_string(self) -> str:
        """What libpq connects by, for a connection outside the pool. It holds the password: never log it."""
        return self._url.set(drivername="postgresql").render_as_string(hide_password=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if meaning := translate_failure(error):
            raise meaning from error
        raise


def _refuse_ended(connection: DBAPIConnection, _record: ConnectionPoolEntry, _proxy: PoolProxiedConnection) -> None:
    """Let the pool connect anew where the server has ended a connection, as it does when it restarts: no request fails for it.

    What ends a connection can be read from its socket, and nothing else comes unasked but for notices, which are rare. Asking the server
    instead would take every search a round trip.
    """
    driver = connection.driver_connection
    arrived = select.poll()
    if not driver.closed:
        arrived.register(driver.fileno(), select.POLLIN)
    if driver.closed or arrived.poll(0):
        raise DisconnectionError


def _write_json(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError as error:
        # JSON has no NaN and no infinity, and PostgreSQL takes none.
        raise ValueNotStorable from error
