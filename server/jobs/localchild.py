"""Runs an order as a child process of this machine: started by exec in a session of its own, killed as a group, its log bounded."""

import asyncio
import logging
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from server.domain.events import ChildEvent
from server.domain.orders import BatchOrder, IndexOrder, Order
from server.jobs.execution import RunningWork, WorkEnd
from server.jobs.memory_kills import count_memory_kills
from server.services.codec import CHILD_EVENT, ORDER

_logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 18
# A document's chunks and vectors come on one line: 4 MiB of text in small chunks with 4096 dimensions stays below.
_MAX_EVENT_BYTES = 512 << 20
_MAX_LOG_BYTES = 4 << 20  # then the file starts anew and one older one is kept
_TAIL_LINES = 20
_MAX_TAIL_LINE_CHARACTERS = 500


class LocalExecution:
    """Starts `program` (such as `python -m server`) with `train`, `index` or `batch` and `--events-fd N` added."""

    def __init__(self, program: Sequence[str], count_kills: Callable[[], int] = count_memory_kills) -> None:
        self._program = tuple(program)
        self._count_kills = count_kills

    async def start(self, order: Order, log_path: Path) -> RunningWork:
        """Start the child and hand it the order."""
        role = _name_role(order)
        kills = self._count_kills()
        read_fd, write_fd = os.pipe()
        reader = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", 0)
        )
        try:
            process = await asyncio.create_subprocess_exec(
                *self._program, role, "--events-fd", str(write_fd),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                pass_fds=(write_fd,), start_new_session=True,
            )  # fmt: skip
        except BaseException:
            pipe.close()
            raise
        finally:
            os.close(write_fd)
        child = LocalChild(process, reader, pipe, _BoundedLog(log_path), lambda: self._count_kills() > kills)
        child.send(ORDER.encode(order) + b"\n")
        return child


def _name_role(order: Order) -> str:
    match order:
        case IndexOrder():
            return "index"
        case BatchOrder():
            return "batch"
        case _:
            # An export loads and merges a base model: the trainer's work.
            return "train"


class LocalChild:
    """One running child. Its standard input stays open as long as this worker lives: the child ends when it closes."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        events: asyncio.StreamReader,
        pipe: asyncio.BaseTransport,
        log: "_BoundedLog",
        has_memory_run_out: Callable[[], bool],
    ) -> None:
        self._process = process
        self._events = events
        self._pipe = pipe
        self._log = log
        self._has_memory_run_out = has_memory_run_out
        self._ending = asyncio.create_task(self._follow_to_end())

    def send(self, line: bytes) -> None:
        """Write to the child's standard input. A child that died at once shows by its end, not here."""
        assert self._process.stdin is not None
        self._process.stdin.write(line)

    async def read_events(self) -> AsyncIterator[Sequence[ChildEvent]]:
        """Stream decoded events; a last line that a kill cut short is dropped."""
        rest = bytearray()
        while data := await self._events.read(_READ_BYTES):
            rest += data
            if b"\n" in data:
                *lines, tail = bytes(rest).split(b"\n")
                rest = bytearray(tail)
                yield [CHILD_EVENT.decode(line) for line in lines]
            elif len(rest) > _MAX_EVENT_BYTES:
                raise ValueError("the child sent an event without an end")

    async def wait(self) -> WorkEnd:
        """Wait for the end of the child and of all that it started."""
        await asyncio.shield(self._ending)
        code = self._process.returncode or 0
        if code >= 0:
            return WorkEnd(f"exit code {code}")
        number = signal.Signals(-code)
        return WorkEnd(f"killed by {number.name}", is_out_of_memory=number is signal.SIGKILL and self._has_memory_run_out())

    def pause(self) -> None:
        """Send SIGUSR1 to the child alone: others of its group would die of it."""
        if not self._ending.done():
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)

    async def stop(self, grace_seconds: float) -> None:
        """Send SIGTERM to the whole group, SIGKILL after the grace."""
        if not self._ending.done():
            self._signal_group(signal.SIGTERM)
            await asyncio.wait({self._ending}, timeout=grace_seconds)
        if not self._ending.done():
            self._signal_group(signal.SIGKILL)
        await asyncio.shield(self._ending)

    def close(self) -> None:
        """Close the event pipe."""
        self._pipe.close()

    def read_log_tail(self) -> str:
        """Give the last lines of the log."""
        return self._log.read_tail()

    async def _follow_to_end(self) -> None:
        assert self._process.stdout is not None
        copying = asyncio.create_task(self._copy_log(self._process.stdout))
        await _wait_for_exit(self._process.pid)
        # Whatever the child left behind in its group dies with it: it would hold the pipes open, and memory.
        self._signal_group(signal.SIGKILL)
        await copying
        await self._process.wait()

    async def _copy_log(self, output: asyncio.StreamReader) -> None:
        with self._log:
            while data := await output.read(_READ_BYTES):
                self._log.write(data)

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


async def _wait_for_exit(pid: int) -> None:
    """Wait for the end of this one process. asyncio's own `wait` also waits for its pipes, which others may hold open."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


class _BoundedLog:
    """A log file of limited size, and the last lines of it in memory. A log that cannot be written never stops a job."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._partial = ""
        self._file: IO[bytes] | None = None
        self._written_bytes = 0

    def __enter__(self) -> "_BoundedLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, data: bytes) -> None:
        lines = (self._partial + data.decode("utf-8", "replace")).splitlines(keepends=True)
        self._partial = lines.pop()[-_MAX_TAIL_LINE_CHARACTERS:] if lines and not lines[-1].endswith("\n") else ""
        self._tail.extend(line.rstrip()[-_MAX_TAIL_LINE_CHARACTERS:] for line in lines)
        try:
            self._written_bytes += self._provide_file().write(data)
        except OSError as error:
            _logger.warning("cannot write the log of a job: %s", error)

    def _provide_file(self) -> IO[bytes]:
        if self._file is not None and self._written_bytes > _MAX_LOG_BYTES:
            self._file.close()
            self._path.replace(self._path.with_name(self._path.name + ".old"))
            self._file = None
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb", buffering=0)
            self._written_bytes = 0
        return self._file

    def read_tail(self) -> str:
        return "\n".join([*self._tail, self._partial]).strip()
