"""Models that fail under a real engine process: files that rot or go, templates that never end, clients that leave. Others go on."""

import asyncio
import shutil
from pathlib import Path

import grpc
import psutil
import pytest
from grpc import aio
from modeltraining.v1 import inference_service_pb2 as pb

from server.domain.generation import ModelReference
from tests.inference.engines import LIMITS
from tests.inference.versions import make_version
from tests.integration.serving import Serving, read, write_ask
from tests.tiny_models import build_tiny_causal_model


async def say(serving: Serving, model: str) -> str:
    answer = await serving.stub.Generate(pb.GenerateRequest(**write_ask(8, model=model)))
    return str(answer.text)


async def refuse(serving: Serving, model: str) -> str:
    """Demand that a model's request fails for what is wrong with the model; give the sentence."""
    with pytest.raises(aio.AioRpcError) as refused:
        await say(serving, model)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return str(refused.value.details())


async def test_a_version_that_rots_or_goes_fails_alone_and_serves_again_once_it_is_whole(serving: Serving, tmp_path: Path) -> None:
    base = build_tiny_causal_model(tmp_path / "tiny")
    gone, rotten, good = (
        make_version(serving.storage, name, base, "lora", seed=seed) for seed, name in enumerate(("gone", "rotten", "good"))
    )
    weights = rotten.directory / "adapter_model.safetensors"
    whole = weights.read_bytes()
    running, steady = serving.stream(tokens=480, model="gone@llama"), serving.stream(tokens=480)
    for stream in (running, steady):
        await anext(aiter(stream))
    shutil.rmtree(gone.directory)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    await serving.engine.unload(ModelReference("mdl_gone", "llama", 1, "gone"))
    refused = await asyncio.gather(*(refuse(serving, model) for model in ("gone@llama", "rotten@llama") * 4))
    assert not [sentence for sentence in refused if str(serving.storage) in sentence]
    assert (await serving.engine.describe()).quarantined == ["mdl_gone", "mdl_rotten"]
    assert await say(serving, "good@llama") != await say(serving, "llama")
    for stream in (running, steady):
        assert (await read(stream))[-1].finished.usage.completion_tokens == 480
    weights.write_bytes(whole)
    await serving.engine.forget("mdl_rotten")
    assert await say(serving, "rotten@llama") not in (await say(serving, "good@llama"), await say(serving, "llama"))
    assert good.directory.exists()


async def test_a_template_that_never_ends_is_interrupted_and_slows_nobody_to_a_halt(serving: Serving) -> None:
    await say(serving, "llama")
    request = pb.GenerateRequest(model_id="endless")
    request.messages.add(role="user", content="Who?")

    async def ask() -> None:
        with pytest.raises(aio.AioRpcError) as refused:
            await serving.stub.Generate(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "template took longer" in str(refused.value.details())

    asking, tokens = asyncio.create_task(ask()), 0
    while not asking.done():
        await read(serving.stream(tokens=20))
        tokens += 20
    await asking
    assert tokens > 20
    await ask()
    assert await say(serving, "endless"), "a prompt needs no template"
    process = psutil.Process(serving.process_id)
    before = process.cpu_times()
    await asyncio.sleep(1)
    after = process.cpu_times()
    assert after.user - before.user < 0.5, "the loop has ended"


async def test_the_place_of_a_client_that_leaves_is_the_next_ones_while_all_others_run(serving: Serving) -> None:
    streams = [serving.stream(tokens=490) for _ in range(LIMITS.max_rows)]
    for stream in streams:
        await anext(aiter(stream))
    waiting = asyncio.create_task(anext(aiter(next_one := serving.stream(tokens=490))))
    while await count(serving) != (LIMITS.max_rows, 1):
        assert not waiting.done(), "there is no place for it yet"
    streams[3].cancel()
    await waiting
    assert await count(serving) == (LIMITS.max_rows, 0)
    for stream in (*streams, next_one):
        stream.cancel()
    await serving.wait_until_idle()


async def count(serving: Serving) -> tuple[int, int]:
    """Count the tiny model's requests that run and that wait."""
    (tiny,) = [model for model in (await serving.engine.describe()).models if model.base_model == "llama"]
    return tiny.running_requests, tiny.waiting_requests
