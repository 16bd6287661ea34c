"""Keeps two stacks apart: one per data directory, and none on ports that somebody uses."""

import asyncio
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_LOCK_FILE = "up.lock"
# The parts of a stack that was killed a moment ago are just about to let go of their ports.
_RETRIES = 20
_RETRY_SECONDS = 0.1


class Occupied(Exception):
    """What this stack needs belongs to another; the message says what."""


@contextmanager
def hold_data_directory(data_directory: Path) -> Iterator[None]:
    """Hold the directory's lock. Raises Occupied naming the process that has it. The kernel frees it when the holder dies."""
    data_directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise Occupied(f"Another `up` (process {holder}) runs on {data_directory}. Stop it, or set DATA_DIRECTORY.") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


async def check_ports(address: str, ports: Mapping[str, int]) -> None:
    """Raise Occupied with a sentence for each port (by variable) that cannot be listened on."""
    for attempt in range(_RETRIES):
        problems = [problem for name, port in ports.items() if (problem := _try_port(address, name, port))]
        if not problems:
            return
        if attempt < _RETRIES - 1:
            await asyncio.sleep(_RETRY_SECONDS)
    raise Occupied("\n".join(problems))


def _try_port(address: str, name: str, port: int) -> str | None:
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
            listener.listen()
    except socket.gaierror:
        return f"BIND_ADDRESS {address!r} is no address of this machine."
    except OSError as error:
        return f"{name}: port {port} on {address} cannot be used: {(error.strerror or str(error)).lower()}."
    return None
