"""A real vLLM lets go of what nobody reads any more."""

import asyncio
import re
import tempfile
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest

from server.inference.openai.connection import Connection
from server.inference.openai.engine import OpenAIEngine
from server.inference.openai.voices import Voices
from server.storage.artefacts import ArtefactStore
from tests.inference.asking import ask
from tests.inference.engines import Directories
from tests.inference.vllm_server import start_vllm_server
from tests.tiny_models import build_tiny_causal_model


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """A tiny model that can write for a while, and so slowly that the server has time for questions: a smaller one starves /metrics."""
    with tempfile.TemporaryDirectory() as directory:
        yield build_tiny_causal_model(Path(directory) / "llama", "llama", head_dim=32, max_position_embeddings=16384, num_hidden_layers=32)


def count_running(url: str) -> int:
    found = re.search(r"^vllm:num_requests_running\{[^}]*\} (\S+)", httpx.get(f"{url}/metrics", timeout=10).text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


async def wait_for_running(url: str, count: int) -> None:
    async with asyncio.timeout(10):
        while await asyncio.to_thread(count_running, url) != count:  # noqa: ASYNC110  # polled, as an operator would
            await asyncio.sleep(0.05)


async def test_leaving_a_stream_ends_it_at_the_server_and_no_other(model: Path) -> None:
    with start_vllm_server(model, "llama", model / "vllm.log", "--dtype", "float32", "--enforce-eager") as url:
        engine = OpenAIEngine(Connection(url), Voices(Directories({"llama": model}), ArtefactStore(model)), max_requests=8)
        # Without its end token (1) the tiny model writes on for much longer than this test takes.
        request = ask("maps", max_tokens=16000, logit_bias={1: -100.0})
        async with aclosing(engine.generate(request)) as staying:
            await anext(staying)
            async with aclosing(engine.generate(request)) as leaving:
                await anext(leaving)
                await wait_for_running(url, 2)
            await wait_for_running(url, 1)
            assert (await engine.describe()).models[0].running_requests == 1
            await anext(staying)
        await wait_for_running(url, 0)
        await engine.stop()
