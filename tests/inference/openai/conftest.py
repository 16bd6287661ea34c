"""An openai engine over a server that misbehaves when it is told to."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from server.inference.openai.connection import Connection
from server.inference.openai.dialects import Dialect
from server.inference.openai.engine import OpenAIEngine
from server.inference.openai.voices import Voices
from server.storage.artefacts import ArtefactStore
from tests.inference.engines import Directories
from tests.inference.openai.completion_server import CompletionServer, run_server

MAX_REQUESTS = 3
SILENCE_SECONDS = 0.5

MakeEngine = Callable[..., OpenAIEngine]


@pytest.fixture
async def completions() -> AsyncIterator[CompletionServer]:
    """The server."""
    async with run_server(CompletionServer()) as server:
        yield server


@pytest.fixture
async def make_openai_engine(tiny: Callable[[str], Path], tmp_path: Path) -> AsyncIterator[MakeEngine]:
    """Make engines over a URL; they know the base model "llama", and the versions in tmp_path."""
    made: list[OpenAIEngine] = []

    def make(url: str, api_key: str | None = None, dialect: Dialect | None = None) -> OpenAIEngine:
        connection = Connection(url, api_key=api_key, silence_seconds=SILENCE_SECONDS)
        voices = Voices(Directories({"llama": tiny("llama"), "elsewhere": tiny("llama")}), ArtefactStore(tmp_path))
        made.append(OpenAIEngine(connection, voices, max_requests=MAX_REQUESTS, dialect=dialect))
        return made[-1]

    yield make
    for engine in made:
        await engine.stop()


@pytest.fixture
def openai_engine(completions: CompletionServer, make_openai_engine: MakeEngine) -> OpenAIEngine:
    """An engine over the server."""
    return make_openai_engine(completions.url)
