"""One request's events on their way from the thread that computes to its reader, who may be slow, or asleep."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from io import StringIO

from server.domain.errors import ServiceError
from server.domain.generation import Delta, GenerationFinished, PositionLogprobs, TokenEvent

# What unread deltas become one up to, in characters. As protobuf each takes four bytes at most: a quarter of the 4 MiB to which gRPC's
# clients bound a message if nobody tells them otherwise. The rest is for JSON, which takes up to three times as much.
MAX_JOINED_CHARACTERS = 1 << 18
# A log probability's number and the frame around it, in the same measure: 12 bytes as protobuf, some 45 as JSON.
LOGPROB_CHARACTERS = 16


class Mailbox:
    """Deltas that nobody took yet become one, up to a size: what waits is bounded by the request's own length, and each event too."""

    def __init__(self) -> None:
        self._events: deque[_Joined | GenerationFinished | ServiceError] = deque()
        self._filled = asyncio.Event()

    def put(self, event: TokenEvent | ServiceError) -> None:
        """Add an event; on the event loop only."""
        if isinstance(event, Delta):
            size, last = _measure(event), self._events[-1] if self._events else None
            if not isinstance(last, _Joined) or last.size + size > MAX_JOINED_CHARACTERS:
                last = _Joined()
                self._events.append(last)
            last.add(event, size)
        else:
            self._events.append(event)
        self._filled.set()

    async def read(self) -> AsyncGenerator[TokenEvent]:
        """Give events up to the last one. Raises the error that ended the request."""
        while True:
            await self._filled.wait()
            while self._events:
                event = self._events.popleft()
                if isinstance(event, ServiceError):
                    raise event
                if isinstance(event, GenerationFinished):
                    yield event
                    return
                yield event.make_delta()
            self._filled.clear()


class _Joined:
    """Deltas that will be read as one. Put together once, at the end: a new text for each would copy the whole every time."""

    def __init__(self) -> None:
        self.size = 0
        self._text, self._logprobs = StringIO(), list[PositionLogprobs]()

    def add(self, delta: Delta, size: int) -> None:
        self.size += size
        self._text.write(delta.text)
        self._logprobs += delta.logprobs

    def make_delta(self) -> Delta:
        return Delta(self._text.getvalue(), tuple(self._logprobs))


def _measure(delta: Delta) -> int:
    """Give a delta's size in characters."""
    tokens = [token for position in delta.logprobs for token in (position.chosen, *position.top)]
    return len(delta.text) + sum(LOGPROB_CHARACTERS + len(token.token) for token in tokens)
