"""`python -m server up`: every part of the service on this machine, from PostgreSQL to Envoy, in the foreground."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from server.launcher.envoy import make_envoy_part, reachable_address
from server.launcher.exclusion import Occupied, check_ports, hold_data_directory
from server.launcher.leash import leash_command
from server.launcher.part import Part, PartFailed
from server.launcher.postgres import EmbeddedPostgres
from server.launcher.supervision import Supervision
from server.settings import Settings

_API_PREFIX = "/api/v1/model-training"
_MODE_PRIVATE = 0o700


async def run_up(settings: Settings, program: Sequence[str] = (sys.executable, "-m", "server")) -> int:
    """Run the stack until a signal, then stop it. Return the exit code: 0 after a signal, 1 when it could not be started."""
    try:
        with hold_data_directory(settings.data_directory):
            await check_ports(settings.bind_address, {"HTTP_PORT": settings.http_port, "GRPC_PORT": settings.grpc_port})
            return await _Stack(settings, program).run()
    except Occupied as error:
        _report(str(error), to=sys.stderr)
        return 1


class _Stack:
    """All parts, from start to stop."""

    def __init__(self, settings: Settings, program: Sequence[str]) -> None:
        self._settings = settings
        self._program = tuple(program)
        self._supervision = Supervision(_report)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._take_signal)
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                _report(self._describe_places())
            await stopping
        except PartFailed as error:
            _report(str(error), to=sys.stderr)
            return 1
        finally:
            starting.cancel()
            stopping.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)
            await self._supervision.stop(self._hurry)
        return 0

    def _take_signal(self) -> None:
        """Stop; whoever asks twice does not want to wait."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _start(self) -> None:
        settings = self._settings
        logs = settings.data_directory / "logs"
        for directory in (settings.storage_path, settings.cache_path):
            directory.mkdir(parents=True, exist_ok=True)
        _make_private(settings.run_directory)
        database_url = settings.database_url
        if database_url is None:
            postgres = EmbeddedPostgres(settings.data_directory / "postgres", settings.run_directory / "postgres", logs / "postgres.log")
            await self._supervision.start(postgres.make_part())
            database_url = postgres.url
        variables = {"DATABASE_URL": database_url}
        await self._migrate(variables)
        await self._supervision.start(*(self._make_role(role, variables) for role in ("engine", "worker", "api")))
        envoy = make_envoy_part(settings.bind_address, settings.http_port, settings.grpc_port, settings.run_directory, logs / "envoy.log")
        await self._supervision.start(envoy)

    async def _migrate(self, variables: dict[str, str]) -> None:
        command = leash_command([*self._program, "migrate"], signal.SIGKILL, variables=variables)
        process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
        if await process.wait() != 0:
            raise PartFailed("The database's tables could not be brought up to date.")
        _report("the database's tables are up to date")

    def _make_role(self, role: str, variables: dict[str, str]) -> Part:
        return Part(name=role, command=[*self._program, role], variables=variables)

    def _describe_places(self) -> str:
        settings = self._settings
        host = reachable_address(settings.bind_address)
        host = f"[{host}]" if ":" in host else host
        return (
            f"REST  http://{host}:{settings.http_port}{_API_PREFIX}\n"
            f"gRPC  {host}:{settings.http_port} and {host}:{settings.grpc_port}\n"
            f"Data  {settings.data_directory}\n"
            "Ctrl-C stops everything."
        )


def _make_private(directory: Path) -> None:
    """Make the directory of sockets. It may lie in a place where others could have made it first, to listen in."""
    directory.mkdir(mode=_MODE_PRIVATE, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.geteuid():
        raise PartFailed(f"{directory} belongs to another account. Remove it, or set a shorter DATA_DIRECTORY.")
    directory.chmod(_MODE_PRIVATE)


def _report(line: str, to: object = None) -> None:
    print(line, file=sys.stdout if to is None else sys.stderr, flush=True)
