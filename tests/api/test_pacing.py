"""Streams that stay alive, that end when the server stops, and that leave nothing running behind them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

import pytest

from server.api.pacing import beat_while_idle, end_when_set
from server.domain.errors import Unavailable

T = TypeVar("T")


class Source:
    """Gives the numbers with a pause before each; knows whether it was closed."""

    def __init__(self, *pauses_seconds: float) -> None:
        self.pauses_seconds = pauses_seconds
        self.closed = asyncio.Event()

    async def stream(self) -> AsyncIterator[int]:
        try:
            for number, pause in enumerate(self.pauses_seconds):
                await asyncio.sleep(pause)
                yield number
        finally:
            self.closed.set()


async def collect(items: AsyncIterator[T], see: Callable[[T], None]) -> None:
    """Show each item of a stream."""
    async for item in items:
        see(item)


async def test_events_pass_in_order_and_idle_time_is_filled() -> None:
    source = Source(0, 0.25, 0)
    items = [item async for item in beat_while_idle(source.stream(), 0.1)]
    assert items == [0, None, None, 1, 2]
    assert source.closed.is_set()


async def test_a_busy_stream_has_no_heartbeats() -> None:
    assert [item async for item in beat_while_idle(Source(*[0] * 100).stream(), 0.1)] == list(range(100))


async def test_leaving_a_waiting_stream_stops_its_source() -> None:
    source = Source(0, 60)
    async with aclosing(beat_while_idle(source.stream(), 0.05)) as items:
        async for item in items:
            if item is None:
                break
    assert source.closed.is_set()


async def test_a_cancelled_reader_stops_the_source() -> None:
    source = Source(0, 60)
    started = asyncio.Event()

    async def read() -> None:
        async with aclosing(beat_while_idle(source.stream(), 60)) as items:
            async for _ in items:
                started.set()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert source.closed.is_set()


async def test_an_error_of_the_source_reaches_the_reader() -> None:
    async def fail() -> AsyncIterator[int]:
        yield 1
        raise Unavailable("gone")

    items: list[int | None] = []
    with pytest.raises(Unavailable):
        await collect(beat_while_idle(fail(), 1), items.append)
    assert items == [1]


async def test_a_stream_ends_when_the_server_stops() -> None:
    source, stop = Source(0, 60), asyncio.Event()
    items: list[int] = []
    asyncio.get_running_loop().call_later(0.1, stop.set)
    with pytest.raises(Unavailable) as end:
        await collect(end_when_set(source.stream(), stop), items.append)
    assert (items, end.value.reason) == ([0], "SERVER_STOPPING")
    assert source.closed.is_set()


async def test_a_stream_that_never_pauses_ends_too() -> None:
    stop = asyncio.Event()
    items: list[int] = []

    def see(item: int) -> None:
        items.append(item)
        if item == 4:
            stop.set()

    with pytest.raises(Unavailable):
        await collect(end_when_set(Source(*[0] * 1_000).stream(), stop), see)
    assert items == [0, 1, 2, 3, 4]


async def test_a_stream_that_ends_by_itself_is_whole() -> None:
    assert [item async for item in end_when_set(Source(0, 0, 0).stream(), asyncio.Event())] == [0, 1, 2]
