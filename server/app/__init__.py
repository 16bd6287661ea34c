"""The composition root: builds each role from its parts in a module of its own, and imports that in this role only.

The one package that knows every concrete class.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from server.app.parts import check_storage
from server.logs import configure_logging
from server.settings import Settings

# They ask at their start whether a remote storage takes what they write. Children find out when they write.
_STORING_ROLES = ("up", "api", "worker")


def run(role: str, settings: Settings, *, events_fd: int | None, ready_fd: int | None) -> int:
    """Run a role to its end; return the exit code."""
    configure_logging(role, settings.log_level)
    if role in _STORING_ROLES and (problem := check_storage(settings)):
        print(problem, file=sys.stderr)
        return 2
    if role == "up":
        from server.launcher.up import run_up

        return asyncio.run(run_up(settings))
    if role in ("train", "index", "batch"):
        from server.app.children import run_child_role

        return run_child_role(role, settings, events_fd if events_fd is not None else sys.stdout.fileno())
    if role != "engine" and settings.database_url is None:
        print(f"DATABASE_URL must be set for the role {role}: only `up` brings a PostgreSQL of its own.", file=sys.stderr)
        return 2
    if role == "migrate":
        from server.db.migrate import migrate

        assert settings.database_url is not None
        migrate(settings.database_url)
        return 0
    return asyncio.run(_until_stopped(lambda stop: _serve(role, settings, stop, ready_fd)))


async def _serve(role: str, settings: Settings, stop: asyncio.Event, ready_fd: int | None) -> None:
    """Run a role until `stop` is set. It is imported here, for which an engine takes seconds, so that a signal is heeded then too."""
    if role == "engine":
        from server.app.engine import run_engine

        await run_engine(settings, stop, ready_fd)
    elif role == "api":
        from server.app.api import run_api

        await run_api(settings, stop, ready_fd)
    else:
        from server.app.worker import run_worker

        await run_worker(settings, stop, ready_fd)


async def _until_stopped(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> int:
    """Run `work` with an event that SIGTERM or Ctrl-C sets."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await work(stop)
    return 0
