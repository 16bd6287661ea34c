"""A real api over a real engine process with tiny models, for tests that abuse both."""

import asyncio
import json
import math
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from grpc import aio
from modeltraining.v1 import inference_service_pb2 as pb
from modeltraining.v1.generation_pb2 import GenerationParameters
from modeltraining.v1.inference_service_pb2_grpc import InferenceServiceStub
from transformers import LlamaConfig, LlamaForCausalLM

from server.api.server import ApiServer, Services
from server.domain.generation import ModelReference
from server.inference.client import EngineClient
from server.services.inference_service import InferenceService
from server.services.references import References
from tests.inference.engine_process import start_engine_process
from tests.inference.engines import LIMITS
from tests.tiny_models import build_tiny_causal_model

PLACES = LIMITS.max_rows + LIMITS.max_waiting
MEBIBYTE = 1 << 20
ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in range(100000) %}{% endfor %}{% endfor %}{% endfor %}x"


class Names(References):
    """Every name is a base model's, `VERSION@BASE` a version's that lies beside the socket: no database is asked."""

    def __init__(self) -> None:
        pass

    async def resolve(self, organization: str, model_id: str, version: int | None = None) -> ModelReference:
        path, _, base_model = model_id.rpartition("@")
        return ModelReference(f"mdl_{path}", base_model, 1, path) if path else ModelReference(model_id, model_id)


@dataclass(frozen=True)
class Serving:
    """The api's client, the engine's, the engine's process, and where the versions lie that it serves."""

    stub: Any
    engine: EngineClient
    process_id: int
    storage: Path

    def stream(self, tokens: int = 400, *, timeout: float | None = None, **asked: Any) -> Any:
        """Begin a stream."""
        return self.stub.StreamGenerate(pb.StreamGenerateRequest(**write_ask(tokens, **asked)), timeout=timeout)

    async def count_busy(self) -> int:
        """Count requests that hold a place or wait for one."""
        return sum(model.running_requests + model.waiting_requests for model in (await self.engine.describe()).models)

    async def wait_until_idle(self) -> None:
        """Demand that every place comes free, within a few steps of a tiny model."""
        async with asyncio.timeout(5):
            while await self.count_busy():  # noqa: ASYNC110  # the engine's status is polled, as a caller would
                await asyncio.sleep(0.01)


def write_ask(tokens: int, prompt: str = "The river town", model: str = "llama", **parameters: Any) -> dict[str, Any]:
    """Write a request that is greedy and goes on to its last token."""
    # Without its end token (1) the tiny model goes on to the last token that is allowed.
    chosen = GenerationParameters(temperature=0, max_tokens=tokens, logit_bias={1: -100.0}, **parameters)
    return {"model_id": model, "prompt": prompt, "parameters": chosen}


def fill_with_nothing(directory: Path) -> None:
    """Make the model there one of 400 MB of zeros, in a file that takes no disk: behind its header there is a hole."""
    config = LlamaConfig(
        vocab_size=100_000, hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, tie_word_embeddings=True
    )
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items() if name != "lm_head.weight"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    written = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float32
    config.save_pretrained(directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """An engine process for a module's tests; its socket and its id.

    Beside the tiny model, "llama", it knows one of 400 MB, "large", and one whose chat template does not end, "endless".
    """
    root = tmp_path_factory.mktemp("models")
    tiny, large, endless = (build_tiny_causal_model(root / name) for name in ("tiny", "large", "endless"))
    fill_with_nothing(large)
    (endless / "chat_template.jinja").write_text(ENDLESS)
    with tempfile.TemporaryDirectory(prefix="faults") as directory:
        socket = Path(directory) / "engine.sock"
        with start_engine_process(socket, tiny, large=large, endless=endless) as process:
            yield socket, process.pid


@pytest.fixture
async def serving(place: tuple[Path, int]) -> AsyncIterator[Serving]:
    """The api over it."""
    socket, process_id = place
    engine = EngineClient(socket)
    nothing = cast(Any, None)  # what is not asked here
    inference = InferenceService(engine, Names(), nothing, nothing)
    server = ApiServer(Services(nothing, nothing, inference, nothing, nothing, nothing), "default", "127.0.0.1:0")
    port = await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Serving(InferenceServiceStub(channel), engine, process_id, socket.parent)
    await server.stop(0)
    await engine.close()


async def read(call: Any) -> list[Any]:
    """Read a stream to its end."""
    return [message async for message in call]
