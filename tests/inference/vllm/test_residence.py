"""vLLM servers in memory, as real processes under that name: they leave by last use and by idleness, and only if nobody needs them."""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from server.domain.errors import ResourceExhausted, Unavailable
from server.domain.generation import ModelReference
from server.inference.memory import MemoryBudget
from server.inference.vllm import process
from server.inference.vllm.device import measure_weights
from server.inference.vllm.engine import VllmEngine, VllmOptions
from server.storage.artefacts import ArtefactStore
from tests.inference.asking import ask, collect, eventually
from tests.inference.engines import Directories, make_engine
from tests.inference.versions import make_version

STANDIN = Path(__file__).parent / "standin"
FIRST, SECOND = ModelReference("first", "first"), ModelReference("second", "second")

Make = Callable[..., VllmEngine]


@pytest.fixture
def base(tiny: Callable[[str], Path]) -> Path:
    """The files of both base models."""
    return tiny("llama")


@pytest.fixture
async def make(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Make engines over the base models "first" and "second"; stops them."""
    monkeypatch.setenv("PYTHONPATH", str(STANDIN))
    monkeypatch.setattr(process, "FIRST_PAUSE_SECONDS", 0.1)
    made: list[VllmEngine] = []
    with tempfile.TemporaryDirectory(prefix="vllm") as sockets:

        def make(memory: MemoryBudget, *arguments: str) -> VllmEngine:
            options = VllmOptions(Path(sys.executable), arguments, Path(sockets), list, max_requests=8, silence_seconds=60)
            made.append(VllmEngine(Directories({"first": base, "second": base}), ArtefactStore(tmp_path), options, memory))
            return made[-1]

        yield make
        for engine in made:
            await engine.stop()


def list_servers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "--served-model-name" in child.cmdline()]


def list_served() -> list[str]:
    """Give the names of the base models that have a server."""
    commands = [server.cmdline() for server in list_servers()]
    return sorted(words[words.index("--served-model-name") + 1] for words in commands)


async def say(engine: VllmEngine, model: str) -> str:
    return (await collect(engine.generate(ask("maps", model=model)))).text


async def test_a_server_leaves_for_another_unless_it_is_used_or_pinned(make: Make, base: Path) -> None:
    engine = make(MemoryBudget(measure_weights(base) * 3 // 2))
    assert await say(engine, "first") == "one two"
    assert await say(engine, "second") == "one two"
    assert list_served() == ["second"]
    async with aclosing(engine.generate(ask("maps", model="second", max_tokens=150))) as running:
        await anext(running)
        with pytest.raises(ResourceExhausted) as busy:
            await say(engine, "first")
        assert (busy.value.reason, list_served()) == ("ENGINE_MEMORY_BUSY", ["second"])
    await engine.load(FIRST, pinned=True)
    assert [(model.base_model, model.is_pinned) for model in (await engine.describe()).models] == [("first", True)]
    with pytest.raises(ResourceExhausted):
        await say(engine, "second")
    await engine.unload(FIRST)
    assert await say(engine, "second") == "one two"
    with pytest.raises(ResourceExhausted) as never:
        await make(MemoryBudget(measure_weights(base) - 1)).load(FIRST)
    assert never.value.reason == "MODEL_TOO_LARGE"


async def test_the_pin_of_a_version_goes_with_the_version(make: Make, base: Path, tmp_path: Path) -> None:
    engine = make(MemoryBudget(measure_weights(base)))
    references = []
    for number in (1, 2):
        make_version(tmp_path, f"version-{number}", base, "lora", seed=number)
        references.append(ModelReference(f"mdl_{number}", "first", number, f"version-{number}"))
        await engine.load(references[-1], pinned=True)
    await engine.unload(references[0])
    with pytest.raises(ResourceExhausted):
        await say(engine, "second")
    await engine.forget("mdl_2")
    assert await say(engine, "second") == "one two"


async def test_models_of_the_embedded_engine_and_servers_share_one_budget(make: Make, base: Path, tmp_path: Path) -> None:
    embedded = make_engine({"llama": base}, tmp_path, max_model_bytes=measure_weights(base) * 3 // 2)
    embedded.start()
    engine = make(embedded.memory)
    await collect(embedded.generate(ask("maps")))
    await say(engine, "first")
    assert not (await embedded.describe()).models
    await collect(embedded.generate(ask("maps")))
    assert not list_served()
    await embedded.stop()


async def test_an_idle_server_ends_and_comes_back_and_only_one_that_died_makes_another_engine(make: Make) -> None:
    memory = MemoryBudget(1 << 30, idle_seconds=0.3)
    engine = make(memory)
    sweeping = asyncio.create_task(memory.sweep())
    await engine.load(FIRST)
    await engine.load(SECOND, pinned=True)
    instance = (await engine.describe()).instance
    async with aclosing(engine.generate(ask("maps", model="first", max_tokens=150))) as running:
        await anext(running)
        await asyncio.sleep(0.8)
        assert list_served() == ["first", "second"]
    await eventually(lambda: list_served() == ["second"])
    assert await say(engine, "first") == "one two"
    await eventually(lambda: list_served() == ["second"])
    assert (await engine.describe()).instance == instance
    sweeping.cancel()
    [server] = list_servers()
    server.kill()
    await eventually(lambda: len(list_servers()) == 1 and list_servers() != [server])
    async with asyncio.timeout(10):
        while not await is_well(engine):  # noqa: ASYNC110  # polled, as an operator would
            await asyncio.sleep(0.05)
    assert (await engine.describe()).instance != instance, "who loads ahead has to do it again"


async def is_well(engine: VllmEngine) -> bool:
    try:
        return bool((await engine.describe()).models)
    except Unavailable:
        return False


async def test_streams_end_typed_when_their_server_is_killed_and_the_next_server_answers(make: Make) -> None:
    engine = make(MemoryBudget(1 << 30))
    streams = [engine.generate(ask("maps", model="first", max_tokens=150)) for _ in range(8)]
    for stream in streams:
        await anext(stream)
    list_servers()[0].kill()
    results = await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 8
    async with asyncio.timeout(10):
        while not await is_well(engine):  # noqa: ASYNC110  # polled, as an operator would
            await asyncio.sleep(0.05)
    assert await say(engine, "first") == "one two"


@pytest.mark.parametrize(("arguments", "served"), [((), ["second"]), (("--gpu-memory-utilization=0.4",), ["first", "second"])])
async def test_on_a_gpu_servers_share_its_memory_by_the_part_that_each_takes(
    arguments: tuple[str, ...], served: list[str], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_DEVICE", "cuda")
    monkeypatch.setenv("STANDIN_BYTES", str(80 << 30))
    engine = make(MemoryBudget(1), *arguments)  # of the machine's memory they take none
    for model in ("first", "second"):
        await say(engine, model)
    assert list_served() == served
