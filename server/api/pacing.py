"""Streams that stay alive while nothing happens, and that end when the server stops."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from server.domain.errors import Unavailable

T = TypeVar("T")

HEARTBEAT_SECONDS = 10.0  # below the idle time-outs of the gateway and of common proxies (60 s and up)


async def beat_while_idle(events: AsyncIterator[T], idle_seconds: float = HEARTBEAT_SECONDS) -> AsyncGenerator[T | None, None]:
    """Pass events on, and None for a heartbeat whenever none came for `idle_seconds`. Closing this closes the events."""
    pending: asyncio.Task[T] | None = None
    try:
        while True:
            pending = pending or asyncio.create_task(_next(events))
            await asyncio.wait({pending}, timeout=idle_seconds)
            if not pending.done():
                yield None
                continue
            done, pending = pending, None
            try:
                event = done.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        await _close(events, pending)


async def end_when_set(events: AsyncIterator[T], stop: asyncio.Event) -> AsyncGenerator[T, None]:
    """Pass events on until `stop` is set; then raises Unavailable. Closing this closes the events."""
    waiting = asyncio.create_task(stop.wait())
    pending: asyncio.Task[T] | None = None
    try:
        while not stop.is_set():
            pending = asyncio.create_task(_next(events))
            await asyncio.wait({pending, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not pending.done():
                break
            done, pending = pending, None
            try:
                event = done.result()
            except StopAsyncIteration:
                return
            yield event
        raise Unavailable("The server is stopping. Connect again.", reason="SERVER_STOPPING", retry_after_seconds=1.0)
    finally:
        waiting.cancel()
        await _close(events, pending)


async def _next(events: AsyncIterator[T]) -> T:
    return await anext(events)


async def _close(events: AsyncIterator[T], pending: asyncio.Task[T] | None) -> None:
    """Stop a generator that may be running: first the step that it is in, then itself."""
    if pending is not None:
        pending.cancel()
        await asyncio.wait({pending})
        if not pending.cancelled():
            pending.exception()  # seen; the caller has gone
    if isinstance(events, AsyncGenerator):
        await events.aclose()
