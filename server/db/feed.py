"""Tells watchers that a job's log has grown: one query for all watchers of the process, and LISTEN for changed states.

It hands out no events: a watcher reads the log itself.
"""

import asyncio
import json
import logging
from collections import defaultdict

from psycopg import AsyncConnection, Error
from sqlalchemy import select, tuple_

from server.db.database import CONNECT_TIMEOUT_SECONDS, PostgresDatabase
from server.db.locked_job import JOBS_CHANNEL
from server.db.tables import jobs

POLL_SECONDS = 0.25  # what a training step may wait until a watcher sees it
RETRY_SECONDS = 1.0  # after the database failed to answer

_log = logging.getLogger(__name__)
_Key = tuple[str, str]  # organization and job id


class PostgresJobFeed:
    """The JobFeed on PostgreSQL. Starts with its first watcher; `close` it at the end."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database
        self._watchers: dict[_Key, set[_Watcher]] = defaultdict(set)
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def wait(self, organization: str, job_id: str, after_sequence: int, timeout_seconds: float) -> bool:
        """Return True once the log of the job is longer than `after_sequence`, False after the timeout."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._listen())]
        key, watcher = (organization, job_id), _Watcher(after_sequence)
        self._watchers[key].add(watcher)
        self._wake.set()
        try:
            await asyncio.wait_for(watcher.grown.wait(), timeout_seconds)
        except TimeoutError:
            return False
        finally:
            self._watchers[key].discard(watcher)
            if not self._watchers[key]:
                del self._watchers[key]
        return True

    async def close(self) -> None:
        """Stop polling and listening."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _poll(self) -> None:
        while True:
            # Whoever comes later sets it again: nobody watches, nobody asks.
            await self._wake.wait()
            self._wake.clear()
            while self._watchers:
                try:
                    await self._look()
                    pause = POLL_SECONDS
                except Exception:
                    # Whatever it was, watchers depend on this loop: it must outlive it.
                    _log.exception("cannot look for new job events")
                    pause = RETRY_SECONDS
                await asyncio.sleep(pause)

    async def _look(self) -> None:
        query = select(jobs.c.organization, jobs.c.job_id, jobs.c.last_sequence)
        query = query.where(tuple_(jobs.c.organization, jobs.c.job_id).in_(list(self._watchers)))
        async with self._database.begin() as connection:
            rows = (await connection.execute(query)).all()
        for organization, job_id, last_sequence in rows:
            self._tell((organization, job_id), last_sequence)

    def _tell(self, key: _Key, last_sequence: int) -> None:
        for watcher in self._watchers.get(key, ()):
            if last_sequence > watcher.after_sequence:
                watcher.grown.set()

    async def _listen(self) -> None:
        """Hear of changed states at once. Polling finds them too, so a lost connection costs a moment and nothing else."""
        while True:
            try:
                await self._listen_once()
            except (Error, OSError) as error:
                _log.warning("cannot listen for job states: %s", error)
            await asyncio.sleep(RETRY_SECONDS)

    async def _listen_once(self) -> None:
        async with await AsyncConnection.connect(
            self._database.connection_string, autocommit=True, connect_timeout=CONNECT_TIMEOUT_SECONDS
        ) as connection:
            await connection.execute(f"LISTEN {JOBS_CHANNEL}")
            async for notice in connection.notifies():
                organization, job_id, last_sequence = json.loads(notice.payload)
                self._tell((organization, job_id), last_sequence)


class _Watcher:
    """One that waits until the log is longer than what it has read."""

    def __init__(self, after_sequence: int) -> None:
        self.after_sequence = after_sequence
        self.grown = asyncio.Event()
