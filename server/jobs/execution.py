"""Where a job's work runs, as a port: a child process on this machine today, an existing engine such as Ray through the same door later."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.domain.events import ChildEvent
from server.domain.orders import Order


@dataclass(frozen=True, slots=True)
class WorkEnd:
    """How work ended, in a few words ("exit code 1", "killed by SIGKILL"), and whether it was killed because memory ran out."""

    description: str
    is_out_of_memory: bool = False


class RunningWork(Protocol):
    """Work that was started. Its end is a hint; what it sent as events and what PostgreSQL says counts."""

    def read_events(self) -> AsyncIterator[Sequence[ChildEvent]]:
        """Stream the events in the order sent, as many at a time as are there, until the work ends. Raises ValueError for nonsense."""

    async def wait(self) -> WorkEnd:
        """Wait for the end; say how it came about."""

    def pause(self) -> None:
        """Ask it to save its state and end by itself. Harmless when it has ended."""

    async def stop(self, grace_seconds: float) -> None:
        """Ask it to end, and after the grace make it end: nothing of it runs afterwards. Harmless when it has ended."""

    def close(self) -> None:
        """Free what belongs to it here; after its end, or nothing more of its events is read."""

    def read_log_tail(self) -> str:
        """Give the last lines that it printed, for the server's log only."""


class Execution(Protocol):
    """Starts work."""

    async def start(self, order: Order, log_path: Path) -> RunningWork:
        """Start the work of an order; what it prints goes to `log_path`."""
