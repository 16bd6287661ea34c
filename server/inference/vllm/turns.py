"""Turns of a base model and of its versions, at a server that must not compute them together."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Lets requests to the base model run, or those to its versions. Nobody overtakes, so that neither side waits for ever."""

    def __init__(self) -> None:
        self._running, self._is_versions = 0, False  # how many run now, and on which side
        self._waiting: deque[tuple[bool, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, *, is_version: bool) -> AsyncIterator[None]:
        """Wait until those of the other side have ended; they wait for the end of this block."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((is_version, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.cancelled():  # before it came
                self._admit()
            else:
                self._leave()

    def _admit(self) -> None:
        while self._waiting and (self._running == 0 or self._waiting[0][0] is self._is_versions):
            self._is_versions, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._running += 1
                turn.set_result(None)

    def _leave(self) -> None:
        self._running -= 1
        self._admit()
