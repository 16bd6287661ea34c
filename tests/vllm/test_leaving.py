"""A real vLLM that nobody asks leaves, with all of its processes, and comes back for who asks again."""

import asyncio
import signal
import tempfile
from pathlib import Path

import psutil
import pytest

from server.inference.memory import MemoryBudget
from server.inference.vllm.engine import VllmEngine, VllmOptions
from server.launcher.leash import leash_command
from server.storage.artefacts import ArtefactStore
from tests.inference.asking import ask, collect, eventually
from tests.inference.engines import Directories
from tests.inference.vllm_server import VARIABLES, VLLM_PYTHON
from tests.tiny_models import build_tiny_causal_model

IDLE_SECONDS = 2.0


def list_children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.timeout(600)
async def test_an_idle_vllm_ends_whole_and_starts_again_for_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    before = list_children()
    with tempfile.TemporaryDirectory(prefix="leaving") as made:
        base = build_tiny_causal_model(Path(made) / "llama", "llama", head_dim=32)
        options = VllmOptions(
            Path(VLLM_PYTHON or "none"), ("--dtype", "float32", "--enforce-eager"), Path(made),
            lambda command: leash_command(command, signal.SIGTERM), max_requests=8, silence_seconds=60,
        )  # fmt: skip
        memory = MemoryBudget(1 << 30, IDLE_SECONDS)
        engine = VllmEngine(Directories({"llama": base}), ArtefactStore(Path(made)), options, memory)
        sweeping = asyncio.create_task(memory.sweep())
        first = await collect(engine.generate(ask("maps")))
        started = [process for process in list_children() if process not in before]
        assert started
        await eventually(lambda: not engine.list_holdings(), 10 * IDLE_SECONDS)
        await eventually(lambda: not any(process.is_running() for process in started), 20)
        again = await collect(engine.generate(ask("maps")))
        assert again.text == first.text
        assert again.end.timings.load_seconds > 1, "whoever asks next waits for its start, and is told"
        sweeping.cancel()
        await engine.stop()
    assert [process for process in list_children() if process not in before and process.is_running()] == []
