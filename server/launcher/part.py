"""One part of the stack as a process: how it is started, how one knows that it is ready, how it is stopped."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from server.launcher.leash import leash_command

_PROBE_SECONDS = 0.1


class PartFailed(Exception):
    """A part could not be started; the message is a sentence for whoever started the stack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What to run. Without a `probe` the command is told `--ready-fd N` and writes there when it is ready."""

    name: str
    command: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)  # joined to the environment of this process
    probe: Callable[[], Awaitable[bool]] | None = None
    before_start: Callable[[], Awaitable[None]] | None = None
    user: str | None = None
    log_path: Path | None = None  # None: the terminal
    ready_seconds: float = 120.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 15.0
    # What the kernel sends when this process is killed and cannot stop its parts any more.
    death_signal: signal.Signals = signal.SIGKILL


class PartProcess:
    """A part that runs."""

    def __init__(self, part: Part, process: asyncio.subprocess.Process, ready: asyncio.StreamReader | None) -> None:
        self.part = part
        self._process = process
        self._ready = ready

    @classmethod
    async def start(cls, part: Part) -> "PartProcess":
        """Start the process, in a session of its own: a Ctrl-C in the terminal is for the launcher alone, which stops parts in order."""
        if part.before_start is not None:
            await part.before_start()
        if part.probe is not None:
            return cls(part, await cls._execute(part, part.command, ()), None)
        read_fd, write_fd = os.pipe()
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", 0))
        try:
            process = await cls._execute(part, [*part.command, "--ready-fd", str(write_fd)], (write_fd,))
        finally:
            os.close(write_fd)
        return cls(part, process, reader)

    @staticmethod
    async def _execute(part: Part, command: Sequence[str], descriptors: Sequence[int]) -> asyncio.subprocess.Process:
        log = _open_log(part.log_path) if part.log_path else None
        try:
            return await asyncio.create_subprocess_exec(
                *leash_command(command, part.death_signal, part.user, part.variables),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=descriptors, start_new_session=True,
            )  # fmt: skip
        finally:
            if log is not None:
                log.close()

    async def wait_ready(self) -> None:
        """Wait until the part is ready. Raises PartFailed when it ends before, or takes too long."""
        ready = asyncio.create_task(self._become_ready())
        end = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({ready, end}, timeout=self.part.ready_seconds, return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and ready.result():
                return
            if not ready.done() and not end.done():
                raise PartFailed(f"{self.part.name} was not ready after {self.part.ready_seconds:g} s.{self._point_to_log()}")
            raise PartFailed(f"{self.part.name} did not start: {await self.wait()}.{self._point_to_log()}")
        finally:
            ready.cancel()
            end.cancel()
            await asyncio.gather(ready, end, return_exceptions=True)

    async def _become_ready(self) -> bool:
        if self._ready is not None:
            return bool(await self._ready.readline())
        assert self.part.probe is not None
        while not await self.part.probe():  # noqa: ASYNC110  # another program sets no event of ours
            await asyncio.sleep(_PROBE_SECONDS)
        return True

    def _point_to_log(self) -> str:
        return f" Its log is {self.part.log_path}." if self.part.log_path else ""

    async def wait(self) -> str:
        """Wait for the end; say how it came about."""
        code = await self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def stop(self, hurry: asyncio.Event) -> None:
        """Ask the part to stop; SIGKILL its whole group after its time, or once `hurry` is set."""
        if self._process.returncode is None:
            self._process.send_signal(self.part.stop_signal)
        end = asyncio.create_task(self._process.wait())
        impatience = asyncio.create_task(hurry.wait())
        await asyncio.wait({end, impatience}, timeout=self.part.stop_seconds, return_when=asyncio.FIRST_COMPLETED)
        impatience.cancel()
        # Also where it has ended by itself: nothing that it started stays behind.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await end


def _open_log(path: Path) -> IO[bytes]:
    """Start the log anew and keep the one of the start before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name(path.name + ".old"))
    return path.open("wb", buffering=0)
