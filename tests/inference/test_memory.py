"""One budget over several holders: the oldest idle one leaves, what is reserved counts, what is idle leaves by itself."""

import asyncio
from collections.abc import Sequence

import pytest

from server.domain.errors import ResourceExhausted
from server.inference.memory import Holding, MemoryBudget


class Shelf:
    """Holds what it is told to, of 10 bytes each."""

    def __init__(self, *names: str) -> None:
        self.last_uses = {name: float(place) for place, name in enumerate(names)}
        self.used: set[str] = set()

    def list_holdings(self) -> Sequence[Holding]:
        """Give all of it."""
        return [self._hold(name, last_use) for name, last_use in self.last_uses.items()]

    def _hold(self, name: str, last_use: float) -> Holding:
        async def unload() -> None:
            del self.last_uses[name]
            await asyncio.sleep(0)

        return Holding(name, 10, last_use, name not in self.used, unload)


async def test_the_idle_weights_that_were_used_longest_ago_leave_whoever_holds_them() -> None:
    memory, first, second = MemoryBudget(45), Shelf("old", "newest"), Shelf("oldest")
    first.last_uses, second.last_uses = {"old": 2.0, "newest": 3.0}, {"oldest": 1.0, "in use": 0.0}
    second.used = {"in use"}
    memory.join(first)
    memory.join(second)
    async with memory.reserve(25):
        assert [*first.last_uses, *second.last_uses] == ["newest", "in use"]


async def test_what_is_reserved_counts_until_its_holder_has_it_or_its_load_has_failed() -> None:
    memory = MemoryBudget(100)
    async with memory.reserve(60):
        with pytest.raises(ResourceExhausted) as busy:
            await _load(memory, 60)
        assert (busy.value.reason, busy.value.data.retry_after_seconds) == ("ENGINE_MEMORY_BUSY", 5.0)
        await _load(memory, 40)
    with pytest.raises(ZeroDivisionError):
        async with memory.reserve(100):
            raise ZeroDivisionError
    await _load(memory, 100)
    with pytest.raises(ResourceExhausted) as never:
        await _load(memory, 101)
    assert (never.value.reason, never.value.data.retry_after_seconds) == ("MODEL_TOO_LARGE", None)


async def _load(memory: MemoryBudget, size_bytes: int) -> None:
    async with memory.reserve(size_bytes):
        pass


async def test_what_comes_into_use_while_others_leave_stays() -> None:
    memory, shelf = MemoryBudget(100, idle_seconds=0.02), Shelf("one", "two")

    class Watching(Shelf):
        def list_holdings(self) -> Sequence[Holding]:
            if "one" not in shelf.last_uses:
                shelf.used.add("two")
            return ()

    memory.join(Watching())
    memory.join(shelf)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await memory.sweep()
    assert list(shelf.last_uses) == ["two"]
    await MemoryBudget(100).sweep()  # where nothing is idle ever, it ends
