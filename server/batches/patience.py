"""Asks an engine again and again where it is busy or away, and tells that apart from a request that it cannot answer."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import TypeVar

from server.domain.errors import ResourceExhausted, ServiceError, Unavailable
from server.domain.generation import GenerationRequest, ModelReference
from server.services.generating import Generation, collect, generate_choices
from server.services.model_ports import Engine

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0  # an engine that starts again takes some ten
# As often an engine may be lost while it computes a request: that one may be what kills it.
MAX_LOSSES = 3
_LOSSES = frozenset({"ENGINE_LOST", "ENGINE_UNAVAILABLE", "ENGINE_FAILED", "GENERATION_FAILED"})


class PatientEngine:
    """An engine for work that nobody waits for."""

    def __init__(self, engine: Engine, pause_seconds: float = FIRST_PAUSE_SECONDS) -> None:
        self._engine = engine
        self._pause_seconds = pause_seconds
        # Requests with which the engine was lost go one at a time: so the one that kills it shows, and the others are not blamed.
        self._suspects = asyncio.Lock()

    async def load(self, model: ModelReference) -> None:
        """Have the model in memory. Raises ServiceError where it cannot be loaded, however long one waits, or kills the engine."""
        await self._outlive(lambda: self._engine.load(model))

    async def answer(self, request: GenerationRequest) -> Generation:
        """Answer a request. Raises ServiceError for one that cannot be answered, or with which the engine was lost too often."""
        return await self._outlive(lambda: collect(request.model, generate_choices(self._engine, request)))

    async def _outlive(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call until the engine lives long enough. Raises Unavailable where it was lost too often."""
        for losses, pause in enumerate(self._pauses(), start=1):
            try:
                async with self._suspects if losses > 1 else nullcontext():
                    return await self._insist(call)
            except Unavailable:
                if losses >= MAX_LOSSES:
                    raise
            await asyncio.sleep(pause)
            await self._await_engine()
        raise AssertionError("pauses do not end")

    async def _await_engine(self) -> None:
        """Wait until the engine lives, as long as that takes."""
        for pause in self._pauses():
            try:
                await self._engine.describe()
                return
            except ServiceError:
                await asyncio.sleep(pause)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call until the engine has room. Raises Unavailable for a lost engine, and whatever waiting does not change."""
        for pause in self._pauses():
            try:
                return await call()
            except (ResourceExhausted, Unavailable) as error:
                if error.data.retry_after_seconds is None or error.reason in _LOSSES:
                    raise
                await asyncio.sleep(max(pause, min(error.data.retry_after_seconds, MAX_PAUSE_SECONDS)))
        raise AssertionError("pauses do not end")

    def _pauses(self) -> "Pauses":
        return Pauses(self._pause_seconds)


class Pauses:
    """Endless pauses, each twice the one before up to a limit, spread so that many who wait do not come back together."""

    def __init__(self, first_seconds: float) -> None:
        self._seconds = first_seconds

    def __iter__(self) -> "Pauses":
        return self

    def __next__(self) -> float:
        seconds, self._seconds = self._seconds, min(2 * self._seconds, MAX_PAUSE_SECONDS)
        return seconds * random.uniform(0.5, 1.0)  # noqa: S311  # nothing is kept secret by it
