"""The engines that the contract suite runs over: one fixture parameter each, all with the same tiny base model and the same versions.

A new implementation of the port joins by a maker in `MAKERS`; what it cannot do by its nature stands in its traits.
"""

import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.domain.generation import ModelReference
from server.inference.client import EngineClient
from server.services.model_ports import Engine
from tests.inference.engine_process import start_engine_process
from tests.inference.engines import make_engine
from tests.inference.versions import make_version

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
    """An engine under the contract. `has_places`: it tells how many requests run, its own and no others'."""

    engine: Engine
    has_places: bool = True


@pytest.fixture(scope="session")
def place(tiny: Callable[[str], Path]) -> Iterator[Place]:
    """The files, in a directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="contract") as directory:
        place = Place(tiny("llama"), Path(directory))
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


MAKERS: Mapping[str, Callable[[Place, pytest.FixtureRequest], AbstractAsyncContextManager[Subject]]] = {
    "embedded": _embedded,
    "process": _process,
}


@pytest.fixture(params=MAKERS)
async def subject(place: Place, request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    """Each engine in turn."""
    async with MAKERS[request.param](place, request) as made:
        yield made
