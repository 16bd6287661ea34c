"""A real engine over a tiny model in float32, and one that fails as it is told."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from server.domain.errors import ServiceError
from server.domain.generation import GenerationRequest, ModelReference, TokenEvent
from server.inference.engine import EmbeddedEngine
from server.services.model_ports import Engine
from tests.inference.engines import make_engine
from tests.tiny_models import build_tiny_causal_model

BASE = ModelReference("llama", "llama")
NO_TROUBLE: Callable[[str], ServiceError | None] = lambda _: None  # noqa: E731


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model."""
    return build_tiny_causal_model(tmp_path_factory.mktemp("batches") / "llama", "llama")


@pytest.fixture
async def engine(tiny: Path, tmp_path: Path) -> AsyncIterator[EmbeddedEngine]:
    """An engine that knows the base model "llama"."""
    made = make_engine({"llama": tiny}, tmp_path)
    made.start()
    yield made
    await made.stop()


@dataclass
class TroubledEngine:
    """A real engine before which failures are put: `trouble` says by a request's id, "load" or "describe" what is raised instead."""

    engine: EmbeddedEngine
    trouble: Callable[[str], ServiceError | None] = NO_TROUBLE
    calls: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    def _meet(self, what: str) -> None:
        self.calls.append(what)
        if error := self.trouble(what):
            raise error

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Generate, if nothing comes between."""
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            self._meet(request.request_id)
            async for event in self.engine.generate(request):
                yield event
        finally:
            self.running -= 1

    async def load(self, model: ModelReference, *, pinned: bool = False) -> None:
        """Load."""
        self._meet("load")
        await self.engine.load(model, pinned=pinned)

    async def describe(self) -> object:
        """Tell the state."""
        self._meet("describe")
        return await self.engine.describe()

    @property
    def port(self) -> Engine:
        """The engine as the port that it is a part of."""
        return cast(Engine, self)
