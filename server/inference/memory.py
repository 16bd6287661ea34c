"""One budget of memory for the weights of several engines: what was used longest ago leaves for what comes, what is idle leaves by itself.

Knows no weights: who holds some (residents.py, vllm/engine.py) lists them and unloads them. Belongs to one event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from server.domain.errors import ResourceExhausted

# Memory comes free when the models in use end their answers; sooner than this a retry seldom finds any.
BUSY_RETRY_SECONDS = 5.0
# How often idle weights are looked for, as a share of the time after which they are unloaded.
SWEEP_SHARE = 0.25

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holding:
    """Weights in memory. `last_use` by time.monotonic; `may_leave`: nobody uses them now, and they are not pinned."""

    name: str
    size_bytes: int
    last_use: float
    may_leave: bool
    unload: Callable[[], Awaitable[None]]


class Holder(Protocol):
    """Who holds weights."""

    def list_holdings(self) -> Sequence[Holding]:
        """Give all weights that are in memory, or come into it, but those that are still only reserved."""


class MemoryBudget:
    """At most `max_bytes` of weights over all holders; those that nobody used for `idle_seconds` leave (None: only for others)."""

    def __init__(self, max_bytes: int, idle_seconds: float | None = None) -> None:
        self._max_bytes, self.idle_seconds = max_bytes, idle_seconds
        self._holders: list[Holder] = []
        self._reserved_bytes = 0

    def join(self, holder: Holder) -> None:
        """Count what a holder has."""
        self._holders.append(holder)

    @asynccontextmanager
    async def reserve(self, needed_bytes: int) -> AsyncIterator[None]:
        """Make room for weights, and keep it until the block ends, by when their holder lists them.

        Raises ResourceExhausted where there is none: for good, or while others are in use.
        """
        await self._make_room(needed_bytes)
        self._reserved_bytes += needed_bytes
        try:
            yield
        finally:
            self._reserved_bytes -= needed_bytes

    async def sweep(self) -> None:
        """Unload what is idle, for ever; ends at once where nothing leaves by itself."""
        while self.idle_seconds is not None:
            await asyncio.sleep(self.idle_seconds * SWEEP_SHARE)
            await self._unload_idle(self.idle_seconds)

    async def _unload_idle(self, idle_seconds: float) -> None:
        # Looked at anew after each one: meanwhile another may have come into use.
        while idle := [held for held in self._list_leaving() if time.monotonic() - held.last_use >= idle_seconds]:
            logger.info("unloading %s: idle for %.0f s", idle[0].name, time.monotonic() - idle[0].last_use)
            await idle[0].unload()

    async def _make_room(self, needed_bytes: int) -> None:
        if needed_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"The model needs {needed_bytes >> 20} MiB of memory; this engine may use {self._max_bytes >> 20} MiB for all.",
                reason="MODEL_TOO_LARGE",
            )
        while self._count_bytes() + needed_bytes > self._max_bytes:
            leaving = self._list_leaving()
            if not leaving:
                raise ResourceExhausted(
                    f"The model needs {needed_bytes >> 20} MiB of memory, which the models in use take now.",
                    reason="ENGINE_MEMORY_BUSY",
                    retry_after_seconds=BUSY_RETRY_SECONDS,
                )
            oldest = min(leaving, key=lambda held: held.last_use)
            logger.info("unloading %s: another model needs its memory", oldest.name)
            await oldest.unload()

    def _count_bytes(self) -> int:
        return self._reserved_bytes + sum(held.size_bytes for held in self._list_holdings())

    def _list_leaving(self) -> Sequence[Holding]:
        return [held for held in self._list_holdings() if held.may_leave]

    def _list_holdings(self) -> Sequence[Holding]:
        return [held for holder in self._holders for held in holder.list_holdings()]
