"""Models loaded ahead, in a real engine: at its start, after its restart, after a promotion, and though one of them fails."""

from pathlib import Path

from server.domain.errors import NotFound
from server.domain.generation import ModelReference
from server.inference.engine import EmbeddedEngine
from server.services.preloading import Preloader
from server.services.references import References
from tests.inference.engines import make_engine
from tests.inference.versions import make_version
from tests.tiny_models import build_tiny_causal_model


class Table(References):
    """Resolves names by a table, as the database would."""

    def __init__(self, table: dict[str, ModelReference]) -> None:
        self.table = table

    async def resolve(self, organization: str, model_id: str, version: int | None = None) -> ModelReference:
        if model_id not in self.table:
            raise NotFound.of("model", model_id)
        return self.table[model_id]


async def describe(engine: EmbeddedEngine) -> list[tuple[str, bool, int]]:
    return [(model.base_model, model.is_pinned, model.adapters_loaded) for model in (await engine.describe()).models]


async def test_named_models_are_loaded_in_whatever_engine_there_is(tmp_path: Path) -> None:
    models = {name: build_tiny_causal_model(tmp_path / name, name) for name in ("llama", "qwen2")}
    for number in (1, 2):
        make_version(tmp_path, f"v{number}", models["llama"], "lora", seed=number)
    versions = [ModelReference("mdl_1", "llama", number, f"v{number}") for number in (1, 2)]
    table = Table({"mdl_1": versions[0], "qwen2": ModelReference("qwen2", "qwen2")})

    first = make_engine(models, tmp_path)
    first.start()
    preloader = Preloader(first, table, ["qwen2", "nowhere"], ["mdl_1"])
    await preloader.follow("default", await first.describe())
    expected = [("llama", True, 1), ("qwen2", False, 0)]
    assert await describe(first) == expected
    table.table["mdl_1"] = versions[1]
    await preloader.follow("default", await first.describe())
    assert await describe(first) == expected, "the version that serves now is loaded and pinned, the other one left"
    await first.unload(versions[1])
    assert await describe(first) == [("llama", False, 0), ("qwen2", False, 0)]
    await preloader.follow("default", await first.describe())
    assert await describe(first) == [("llama", False, 0), ("qwen2", False, 0)], "an engine is told once"
    await first.stop()
    second = make_engine(models, tmp_path)
    second.start()
    again = Preloader(second, table, [], ["mdl_1"])
    again._instance, again._loaded = preloader._instance, dict(preloader._loaded)
    await again.follow("default", await second.describe())
    assert await describe(second) == [("llama", True, 1)], "another instance is told anew"
    await second.stop()
