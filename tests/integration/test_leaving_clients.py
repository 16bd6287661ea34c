"""REST clients that leave in mid-stream, through Envoy, the api and the engine: their place is the next one's while all others run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.inference.client import EngineClient
from tests.e2e.stack import Stack
from tests.tiny_models import build_tiny_causal_model

PLACES = 16  # MAX_CONCURRENT_GENERATIONS
TOKENS = 1900  # 16 times fit into KV_CACHE_TOKENS


@pytest.fixture(scope="module")
def long_model(stack: Stack) -> str:
    """A tiny model that can write for longer than this test takes."""
    stack.wait_ready()
    directory = Path(stack.data_directory) / "models" / "tiny-long"
    return str(build_tiny_causal_model(directory, "llama", max_position_embeddings=4096))


@asynccontextmanager
async def begin(client: httpx.AsyncClient, stack: Stack, model: str) -> AsyncIterator[Any]:
    """Begin a stream and read its first message; leaves it by closing the connection."""
    body = {"model_id": model, "prompt": "The river", "parameters": {"temperature": 0, "max_tokens": TOKENS, "logit_bias": {"1": -100}}}
    async with client.stream("POST", stack.api + "/inference/stream", json=body, timeout=60) as response:
        lines = response.aiter_lines()
        assert "delta" in await anext(lines)
        yield lines


async def count(engine: EngineClient, model: str) -> tuple[int, int]:
    """Count a model's requests that run and that wait."""
    found = [status for status in (await engine.describe()).models if status.base_model == model]
    return (found[0].running_requests, found[0].waiting_requests) if found else (0, 0)


async def test_a_rest_client_that_leaves_frees_its_place_while_all_others_run(stack: Stack, long_model: str) -> None:
    engine = EngineClient(stack.data_directory / "run" / "engine.sock")
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client, AsyncExitStack() as others:
        leaving = AsyncExitStack()
        await leaving.enter_async_context(begin(client, stack, long_model))
        for _ in range(PLACES - 1):
            await others.enter_async_context(begin(client, stack, long_model))
        waiting = asyncio.create_task(others.enter_async_context(begin(client, stack, long_model)))
        while await count(engine, long_model) != (PLACES, 1):
            assert not waiting.done(), "there is no place for it yet"
        await leaving.aclose()
        await waiting
        assert await count(engine, long_model) == (PLACES, 0)
    async with asyncio.timeout(10):
        while await count(engine, long_model) != (0, 0):  # noqa: ASYNC110  # polled, as an operator would
            await asyncio.sleep(0.05)
    await engine.close()
