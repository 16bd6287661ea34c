"""Inspections in a process of their own: a stranger's file is parsed where it can harm nobody. Knows the child's protocol only."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict

from server.domain.datasets import DatasetFormat, Inspection, InspectionOrder, InspectionProgress, RecordKind
from server.services.codec import Codec

COMMAND = (sys.executable, "-m", "server", "inspect")
MAX_LINE_BYTES = 1 << 20
Message = InspectionProgress | Inspection
_MESSAGE = Codec[Message](Message)
# What the child needs of the environment: no tokens, no addresses.
ENVIRONMENT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


class InspectionProcesses:
    """Inspects files, at most a few at once: each is a process."""

    def __init__(self, *, command: Sequence[str] = COMMAND, at_once: int | None = None) -> None:
        self._command = command
        self._places = asyncio.Semaphore(at_once or max(1, (os.cpu_count() or 1) // 2))

    async def inspect(self, order: InspectionOrder) -> AsyncGenerator[Message]:
        """Look through a file: how far it is, and last an Inspection. Closing ends the process."""
        async with self._places:
            child = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                limit=MAX_LINE_BYTES,
                start_new_session=True,
            )
            try:
                async for message in self._read(child, order):
                    yield message
            finally:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await child.wait()

    async def _read(self, child: asyncio.subprocess.Process, order: InspectionOrder) -> AsyncGenerator[Message]:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        errors = asyncio.create_task(child.stderr.read())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            child.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            await child.stdin.drain()
        while line := await child.stdout.readline():
            message = _MESSAGE.decode(line)
            yield message
            if isinstance(message, Inspection):
                errors.cancel()
                return
        said = (await errors).decode("utf-8", "replace")
        if await child.wait() > 0 and "MemoryError" not in said:
            # Not the file's doing but ours: a bug, or an installation that does not work.
            raise RuntimeError(f"an inspection failed: {said[-2000:]}")
        yield _give_up(order)


def _give_up(order: InspectionOrder) -> Inspection:
    """Say of a file that its reader was killed over: by its limits, or by a fault that the file has found."""
    message = "Reading the file takes more memory or time than any records should, or breaks its reader."
    kind, form = order.record_kind or RecordKind.MIXED, order.format or DatasetFormat.JSONL
    return Inspection(form, None, kind, 0, 0, error_code="FILE_NOT_READABLE", error=message)
