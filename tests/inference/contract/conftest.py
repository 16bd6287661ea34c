"""The engines that the contract suite runs over: one fixture parameter each, all with the same tiny base model and the same versions.

A new implementation of the port joins by a maker in `MAKERS`; what it cannot do by its nature stands in its traits.
Engines over a real vLLM join in `make test-vllm` only, which has one.
"""

import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.domain.generation import ModelReference
from server.inference.client import EngineClient
from server.inference.memory import MemoryBudget
from server.inference.openai.connection import Connection
from server.inference.openai.engine import OpenAIEngine
from server.inference.openai.voices import Voices
from server.inference.vllm.engine import VllmEngine, VllmOptions
from server.launcher.leash import leash_command
from server.services.model_ports import Generator
from server.storage.artefacts import ArtefactStore
from tests.inference.engine_process import start_engine_process
from tests.inference.engines import Directories, make_engine
from tests.inference.versions import make_version
from tests.inference.vllm_server import VARIABLES, VLLM_PYTHON, start_vllm_server
from tests.tiny_models import build_tiny_causal_model

BASE = ModelReference("llama", "llama")
VERSIONS = tuple(ModelReference("mdl_tiny", "llama", number, f"version-{number}") for number in (1, 2))
BROKEN = ModelReference("mdl_broken", "llama", 1, "broken")


@dataclass(frozen=True)
class Place:
    """Where the base model and the versions lie, and the socket of the engine process over them."""

    base: Path
    storage: Path

    @property
    def socket(self) -> Path:
        """The engine process' socket."""
        return self.storage / "engine.sock"


@dataclass(frozen=True)
class Subject:
    """An engine under the contract. `mixes_base`: the base model's requests may run beside its versions'."""

    engine: Generator
    mixes_base: bool = True


@pytest.fixture(scope="session")
def place() -> Iterator[Place]:
    """The files, in a directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="contract") as directory:
        # vLLM's attention on CPUs knows no heads of less than 32.
        base = build_tiny_causal_model(Path(directory) / "llama", "llama", head_dim=32)
        place = Place(base, Path(directory))
        for seed, version in enumerate(VERSIONS, start=1):
            make_version(place.storage, version.adapter_path or "", place.base, "lora", seed=seed)
        broken = make_version(place.storage, BROKEN.adapter_path or "", place.base, "lora")
        (broken.directory / "adapter_model.safetensors").write_bytes(b"no tensors")
        yield place


@pytest.fixture(scope="session")
def engine_process(place: Place) -> Iterator["subprocess.Popen[bytes]"]:
    """An engine in a process of its own, for all tests."""
    with start_engine_process(place.socket, place.base) as process:
        yield process


@pytest.fixture(scope="session")
def vllm_url(place: Place) -> Iterator[str]:
    """A vLLM server over the same base model, for all tests."""
    log = place.storage / "vllm.log"
    with start_vllm_server(place.base, "llama", log, "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16") as url:
        yield url


@asynccontextmanager
async def _embedded(place: Place, _: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    engine = make_engine({"llama": place.base}, place.storage)
    engine.start()
    yield Subject(engine)
    await engine.stop()


@asynccontextmanager
async def _process(place: Place, request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    request.getfixturevalue("engine_process")
    client = EngineClient(place.socket)
    yield Subject(client)
    await client.close()


@asynccontextmanager
async def _openai(place: Place, request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    connection = Connection(request.getfixturevalue("vllm_url"))
    engine = OpenAIEngine(connection, Voices(Directories({"llama": place.base}), ArtefactStore(place.storage)), max_requests=64)
    # vLLM's kernels for CPUs, not those for GPUs, give the base model's requests the adapter of others in their batch
    # (https://github.com/vllm-project/vllm/pull/48421).
    yield Subject(engine, mixes_base=False)
    await engine.stop()


@pytest.fixture(scope="session")
async def vllm_engine(place: Place) -> AsyncIterator[VllmEngine]:
    """An engine that starts a vLLM of its own at first use, for all tests; it gets this process' variables."""
    options = VllmOptions(
        Path(VLLM_PYTHON or "none"), ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"), place.storage,
        lambda command: leash_command(command, signal.SIGTERM), max_requests=64, silence_seconds=60,
    )  # fmt: skip
    engine = VllmEngine(Directories({"llama": place.base}), ArtefactStore(place.storage), options, MemoryBudget(1 << 40))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        yield engine
    await engine.stop()


@asynccontextmanager
async def _vllm(_: Place, request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    yield Subject(request.getfixturevalue("vllm_engine"))


Maker = Callable[[Place, pytest.FixtureRequest], AbstractAsyncContextManager[Subject]]
MAKERS: Mapping[str, Maker] = {"embedded": _embedded, "process": _process, **({"openai": _openai, "vllm": _vllm} if VLLM_PYTHON else {})}


@pytest.fixture(params=MAKERS)
async def subject(place: Place, request: pytest.FixtureRequest, vllm_engine: VllmEngine) -> AsyncIterator[Subject]:
    """Each engine in turn. (`vllm_engine` is named here so that it is made outside of the running loop; it starts nothing by itself.)"""
    async with MAKERS[request.param](place, request) as made:
        yield made
