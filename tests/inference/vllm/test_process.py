"""A server in a process of its own, as real processes: waited for, started again when it dies, gone when it is stopped."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from server.domain.errors import Unavailable
from server.inference.openai.connection import Connection
from server.inference.vllm import process
from server.inference.vllm.process import VllmProcess
from tests.inference.asking import eventually

Make = Callable[[str], VllmProcess]


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Make processes that serve or fail; stops them."""
    monkeypatch.setattr(process, "FIRST_PAUSE_SECONDS", 0.1)
    made: list[VllmProcess] = []
    with tempfile.TemporaryDirectory(prefix="vllm") as directory:
        socket = Path(directory) / "vllm.sock"
        connection = Connection("http://vllm", uds=socket)

        async def is_serving() -> bool:
            return bool(await connection.list_models())

        def make(what: str) -> VllmProcess:
            command = [sys.executable, "-m", "tests.inference.vllm.listening_program", str(socket), what]
            made.append(VllmProcess("llama", command, socket, is_serving))
            made[-1].start()
            return made[-1]

        yield make
        for one in made:
            await one.stop()
        await connection.close()


def find_programs() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "tests.inference.vllm.listening_program" in child.cmdline()]


async def test_one_that_dies_is_started_again_and_one_that_is_stopped_is_not(make: Make) -> None:
    server = make("serve")
    await server.wait_ready()
    [first] = find_programs()
    os.kill(first.pid, signal.SIGKILL)
    await eventually(lambda: server.deaths == 1)
    with pytest.raises(Unavailable) as dead:
        await server.wait_ready()
    assert (dead.value.reason, dead.value.data.retry_after_seconds) == ("ENGINE_UNAVAILABLE", 0.1)
    await eventually(lambda: server.is_ready)
    await server.wait_ready()
    [second] = find_programs()
    assert second.pid != first.pid
    await server.stop()
    assert not find_programs()


async def test_one_that_cannot_start_says_so_to_all_who_wait_and_is_tried_ever_later(make: Make) -> None:
    server = make("fail")
    results = await asyncio.gather(*(server.wait_ready() for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 3
    await eventually(lambda: server.deaths >= 3)
    assert (server.explain_death().data.retry_after_seconds or 0) >= 0.4


async def test_one_that_never_answers_is_ended_and_started_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_SECONDS", 0.5)
    server = make("hang")
    await eventually(lambda: bool(find_programs()))
    [first] = find_programs()
    async with asyncio.timeout(10):
        with pytest.raises(Unavailable):
            await server.wait_ready()
    await eventually(lambda: any(program.pid != first.pid for program in find_programs()))
    assert not first.is_running()
