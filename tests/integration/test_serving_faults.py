"""Generation under abuse: a real api over a real engine process, called by clients that leave, storm, wait or send far too much."""

import asyncio
import json
import math
import random
import resource
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import psutil
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from modeltraining.v1 import inference_service_pb2 as pb
from modeltraining.v1.generation_pb2 import GenerationParameters
from modeltraining.v1.inference_service_pb2_grpc import InferenceServiceStub
from transformers import LlamaConfig, LlamaForCausalLM

from server.api.boundary import STATUS_DETAILS_TRAILER
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


class Names(References):
    """Every name is a base model's: no database is asked."""

    def __init__(self) -> None:
        pass

    async def resolve(self, organization: str, model_id: str, version: int | None = None) -> ModelReference:
        return ModelReference(model_id, model_id)


@dataclass(frozen=True)
class Serving:
    """The api's client, the engine's, and the engine's process."""

    stub: Any
    engine: EngineClient
    process_id: int

    def stream(self, tokens: int = 400, **more: Any) -> Any:
        """Begin a stream."""
        return self.stub.StreamGenerate(pb.StreamGenerateRequest(**_ask(tokens)), **more)

    async def count_busy(self) -> int:
        """Count requests that hold a place or wait for one."""
        return sum(model.running_requests + model.waiting_requests for model in (await self.engine.describe()).models)

    async def wait_until_idle(self) -> None:
        """Demand that every place comes free, within a few steps of a tiny model."""
        async with asyncio.timeout(5):
            while await self.count_busy():  # noqa: ASYNC110  # the engine's status is polled, as a caller would
                await asyncio.sleep(0.01)


def _ask(tokens: int, prompt: str = "The river town", model: str = "llama") -> dict[str, Any]:
    # Without its end token (1) the tiny model goes on to the last token that is allowed.
    parameters = GenerationParameters(temperature=0, max_tokens=tokens, logit_bias={1: -100.0})
    return {"model_id": model, "prompt": prompt, "parameters": parameters}


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
    """An engine process for all tests; its socket and its id. Beside the tiny model it knows one of 400 MB."""
    root = tmp_path_factory.mktemp("models")
    tiny, large = build_tiny_causal_model(root / "tiny"), build_tiny_causal_model(root / "large")
    fill_with_nothing(large)
    with tempfile.TemporaryDirectory(prefix="faults") as directory:
        socket = Path(directory) / "engine.sock"
        with start_engine_process(socket, tiny, large=large) as process:
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
        yield Serving(InferenceServiceStub(channel), engine, process_id)
    await server.stop(0)
    await engine.close()


def read_status(error: aio.AioRpcError) -> status_pb2.Status:
    details = dict(error.trailing_metadata() or ())[STATUS_DETAILS_TRAILER]
    return status_pb2.Status.FromString(cast(bytes, details))


def has_retry(status: status_pb2.Status) -> bool:
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


async def test_five_hundred_requests_at_once_are_answered_or_told_to_come_again(serving: Serving) -> None:
    await serving.stub.Generate(pb.GenerateRequest(**_ask(1)))
    calls = [serving.stub.Generate(pb.GenerateRequest(**_ask(8))) for _ in range(500)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    answered = [result for result in results if isinstance(result, pb.GenerateResponse)]
    refused = [result for result in results if isinstance(result, aio.AioRpcError)]
    assert len(answered) + len(refused) == 500
    assert len(answered) >= PLACES
    assert refused
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(has_retry(read_status(error)) for error in refused)
    assert len({answer.text for answer in answered}) == 1
    await serving.wait_until_idle()


async def test_a_storm_of_cancels_leaves_every_place_free(serving: Serving) -> None:
    chance = random.Random(7)  # noqa: S311  # no secret

    async def come_and_go() -> None:
        call = serving.stream()
        await asyncio.sleep(chance.random() / 2)
        call.cancel()

    steady = aiter(serving.stream(tokens=100))
    await anext(steady)
    await asyncio.gather(*(come_and_go() for _ in range(200)))
    messages = [message async for message in steady]
    assert messages[-1].finished.usage.completion_tokens == 100
    await serving.wait_until_idle()
    (tiny,) = [model for model in (await serving.engine.describe()).models if model.base_model == "llama"]
    assert tiny.reserved_cache_tokens == 0


async def test_a_deadline_ends_a_stream_in_the_engine_too(serving: Serving) -> None:
    call = serving.stream(tokens=500, timeout=0.15)
    with pytest.raises(aio.AioRpcError) as late:
        await asyncio.wait_for(_read(call), 5)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await serving.wait_until_idle()


async def test_requests_over_their_own_time_end_with_an_error_in_the_stream_once_it_has_begun(serving: Serving) -> None:
    start = time.monotonic()
    await _read(serving.stream(tokens=490))
    seconds = 0.25 * (time.monotonic() - start)
    requests = [pb.StreamGenerateRequest(**_ask(490), timeout_seconds=0.001 if number == 0 else seconds) for number in range(8)]
    ends = await asyncio.gather(*(_read_to_failure(serving.stub.StreamGenerate(request)) for request in requests))
    assert {error.code() for _, error in ends} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    begun = [messages for messages, _ in ends if messages]
    assert begun
    assert {messages[-1].error.code for messages in begun} == {grpc.StatusCode.DEADLINE_EXCEEDED.value[0]}
    await serving.wait_until_idle()


async def test_clients_that_read_nothing_cost_a_text_each_and_slow_nobody(serving: Serving) -> None:
    process = psutil.Process(serving.process_id)
    await _read(serving.stream(tokens=50))
    before = process.memory_info().rss
    sleepers = [serving.stream(tokens=490) for _ in range(LIMITS.max_rows - 1)]
    reader = await asyncio.wait_for(_read(serving.stream(tokens=490)), 30)
    assert reader[-1].finished.usage.completion_tokens == 490
    await serving.wait_until_idle()
    assert process.memory_info().rss - before < 64 * MEBIBYTE
    for sleeper in sleepers:
        assert (await _read(sleeper))[-1].finished.usage.completion_tokens == 490


async def test_a_prompt_of_a_million_characters_is_refused_with_its_figures_while_others_go_on(serving: Serving) -> None:
    steady = aiter(serving.stream(tokens=450))
    await anext(steady)
    with pytest.raises(aio.AioRpcError) as refused:
        await serving.stub.Generate(pb.GenerateRequest(**_ask(8, prompt="maps and houses " * 62_500)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the model's context is 512" in str(refused.value.details())
    assert (await _read(steady))[-1].finished.usage.completion_tokens == 450


async def test_memory_that_runs_out_while_loading_fails_that_model_only(serving: Serving) -> None:
    await _read(serving.stream(tokens=2))
    used = psutil.Process(serving.process_id).memory_info().vms
    limits = resource.prlimit(serving.process_id, resource.RLIMIT_AS)
    resource.prlimit(serving.process_id, resource.RLIMIT_AS, (used + 200 * MEBIBYTE, limits[1]))
    try:
        steady = serving.stream(tokens=300)
        with pytest.raises(aio.AioRpcError) as refused:
            await serving.stub.Generate(pb.GenerateRequest(**_ask(8, model="large")))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no memory" in str(refused.value.details())
        assert (await _read(steady))[-1].finished.usage.completion_tokens == 300
    finally:
        resource.prlimit(serving.process_id, resource.RLIMIT_AS, limits)
    start = time.monotonic()
    assert (await serving.stub.Generate(pb.GenerateRequest(**_ask(2, model="large")))).usage.completion_tokens == 2
    assert time.monotonic() - start < 30


async def test_several_answers_in_a_form_come_through_the_api_with_what_was_left_out(serving: Serving) -> None:
    request = pb.StreamGenerateRequest(model_id="llama", echo_prompt=True)
    for number in range(40):
        request.messages.add(role="user", content=f"Question {number} of many")
        request.messages.add(role="assistant", content=f"Answer {number} to it")
    request.messages.add(role="user", content="The last question")
    request.history = 2  # type: ignore[assignment]  # HISTORY_POLICY_DROP_OLDEST
    request.parameters.constraint.regex = "(yes|no), [0-9]{3}"
    request.parameters.n, request.parameters.temperature, request.parameters.seed = 3, 1.5, 5
    messages = await _read(serving.stub.StreamGenerate(request))
    texts = ["".join(message.delta.text for message in messages if message.delta.choice == choice) for choice in range(3)]
    finished = messages[-1].finished
    assert all(text[:2] in ("ye", "no") and text[-3:].isdigit() for text in texts)
    assert [(end.index, end.seed) for end in finished.choices] == [(0, 5), (1, 6), (2, 7)]
    assert finished.dropped_message_count > 0
    assert "The last question" in finished.rendered_prompt
    count = await serving.stub.CountTokens(pb.CountTokensRequest(model_id="llama", messages=request.messages))
    assert count.prompt_tokens > count.context_tokens == 512
    rendered = await serving.stub.RenderPrompt(pb.RenderPromptRequest(model_id="llama", messages=request.messages, history=request.history))
    assert (rendered.prompt_tokens, rendered.text) == (finished.usage.prompt_tokens, finished.rendered_prompt)


async def _read(call: Any) -> list[Any]:
    return [message async for message in call]


async def _read_to_failure(call: Any) -> tuple[list[Any], aio.AioRpcError]:
    messages = []
    try:
        async for message in call:
            messages.append(message)
    except aio.AioRpcError as error:
        return messages, error
    raise AssertionError("the stream ended well")
