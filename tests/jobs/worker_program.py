"""A worker process with short leases over the children of child_program: `python -m tests.jobs.worker_program DATABASE_URL STORAGE`."""

import asyncio
import signal
import sys
from pathlib import Path

from server.db.database import PostgresDatabase
from server.db.queue import PostgresJobQueue
from tests.jobs.stage import SHORT, make_worker


async def main() -> None:
    database = PostgresDatabase(sys.argv[1])
    shutdown = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, shutdown.set)
    await make_worker(PostgresJobQueue(database), Path(sys.argv[2]), terms=SHORT).run(shutdown)
    await database.close()


if __name__ == "__main__":
    asyncio.run(main())
