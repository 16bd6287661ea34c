"""`python -m server engine` does what its variables say: the real role, asked through its socket."""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.domain.errors import ResourceExhausted
from server.domain.generation import ModelReference
from server.inference.client import EngineClient
from tests.inference.asking import ask, collect
from tests.inference.openai.completion_server import CompletionServer, run_server
from tests.tiny_models import build_tiny_causal_model


@pytest.fixture
async def role() -> AsyncIterator[tuple[EngineClient, Path, Path]]:
    """An engine that may hold 1 MiB of weights; of its two models, one is routed to it and all others to a server."""
    with tempfile.TemporaryDirectory(prefix="role") as directory:
        models = Path(directory) / "models"
        here, there = build_tiny_causal_model(models / "here", intermediate_size=8192), build_tiny_causal_model(models / "there")
        socket = Path(directory) / "engine.sock"
        async with run_server(CompletionServer(served_name=str(there))) as server:
            variables = {"DATA_DIRECTORY": directory, "LOCAL_MODELS_PATH": str(models), "ENGINE_SOCKET": str(socket)}
            variables |= {"ENGINE": server.url, "ENGINE_ROUTES": f"{here}=embedded", "ENGINE_MEMORY_BYTES": str(1 << 20)}
            read, write = os.pipe()
            command = [sys.executable, "-m", "server", "engine", "--ready-fd", str(write)]
            process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **variables}, pass_fds=[write])
            os.close(write)
            try:
                assert await asyncio.to_thread(os.read, read, 6) == b"ready\n"
                client = EngineClient(socket)
                yield client, here, there
                await client.close()
            finally:
                os.close(read)
                process.kill()
                await process.wait()


async def test_engines_are_routed_and_memory_is_bounded_as_the_variables_say(role: tuple[EngineClient, Path, Path]) -> None:
    client, here, there = role
    assert (await collect(client.generate(ask("maps", model=str(there))))).text == "one two"
    with pytest.raises(ResourceExhausted) as large:
        await client.load(ModelReference(str(here), str(here)))
    assert large.value.reason == "MODEL_TOO_LARGE"
