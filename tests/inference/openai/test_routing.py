"""Base models go to the engine that is routed for them, and one engine that is down leaves the others alone."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from server.domain.errors import FailedPrecondition, Unavailable
from server.domain.generation import EmbedRole, ModelReference
from server.inference.routing import RoutedEngine
from tests.inference.asking import ask, collect
from tests.inference.engines import make_engine
from tests.inference.openai.completion_server import CompletionServer
from tests.inference.openai.conftest import MakeEngine


@pytest.fixture
async def routed(
    tiny: Callable[[str], Path], tmp_path: Path, completions: CompletionServer, make_openai_engine: MakeEngine
) -> AsyncIterator[RoutedEngine]:
    """The base model "llama" goes to the server, all others stay here."""
    embedded = make_engine({"mine": tiny("llama"), "llama": tiny("llama")}, tmp_path)
    engine = RoutedEngine(embedded, embedded, {"llama": make_openai_engine(completions.url)})
    engine.start()
    yield engine
    await engine.stop()


async def test_each_base_model_is_served_by_its_engine(routed: RoutedEngine, completions: CompletionServer) -> None:
    assert (await collect(routed.generate(ask("maps")))).text == "one two"
    assert (await collect(routed.generate(ask("maps", model="mine")))).text
    assert len(completions.bodies) == 1
    assert {model.base_model for model in (await routed.describe()).models} == {"llama", "mine"}
    assert await routed.read_context_tokens(ModelReference("llama", "llama")) == 200
    assert await routed.read_context_tokens(ModelReference("mine", "mine")) == 512
    with pytest.raises(FailedPrecondition, match="embeds nothing"):
        await routed.embed("llama", ["maps"], EmbedRole.QUERY)


async def test_health_tells_of_a_server_that_is_down_and_the_rest_goes_on(routed: RoutedEngine, completions: CompletionServer) -> None:
    completions.status = 503
    with pytest.raises(Unavailable):
        await collect(routed.generate(ask("maps")))
    assert (await collect(routed.generate(ask("maps", model="mine")))).text
    before = await routed.describe()
    completions.is_down = True
    with pytest.raises(Unavailable):
        await routed.describe()
    completions.is_down = False
    assert (await routed.describe()).instance != before.instance, "who loads ahead has to do it again"
