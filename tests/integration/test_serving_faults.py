"""Generation under abuse: a real api over a real engine process, called by clients that leave, storm, wait or send far too much."""

import asyncio
import random
import resource
import time
from typing import Any, cast

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from modeltraining.v1 import inference_service_pb2 as pb

from server.api.boundary import STATUS_DETAILS_TRAILER
from tests.inference.engines import LIMITS
from tests.integration.serving import MEBIBYTE, PLACES, Serving, read, write_ask


def read_status(error: aio.AioRpcError) -> status_pb2.Status:
    details = dict(error.trailing_metadata() or ())[STATUS_DETAILS_TRAILER]
    return status_pb2.Status.FromString(cast(bytes, details))


def has_retry(status: status_pb2.Status) -> bool:
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


async def test_five_hundred_requests_at_once_are_answered_or_told_to_come_again(serving: Serving) -> None:
    await serving.stub.Generate(pb.GenerateRequest(**write_ask(1)))
    calls = [serving.stub.Generate(pb.GenerateRequest(**write_ask(8))) for _ in range(500)]
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
        await asyncio.wait_for(read(call), 5)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await serving.wait_until_idle()


async def test_requests_over_their_own_time_end_with_an_error_in_the_stream_once_it_has_begun(serving: Serving) -> None:
    start = time.monotonic()
    await read(serving.stream(tokens=490))
    seconds = 0.25 * (time.monotonic() - start)
    requests = [pb.StreamGenerateRequest(**write_ask(490), timeout_seconds=0.001 if number == 0 else seconds) for number in range(8)]
    ends = await asyncio.gather(*(_read_to_failure(serving.stub.StreamGenerate(request)) for request in requests))
    assert {error.code() for _, error in ends} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    begun = [messages for messages, _ in ends if messages]
    assert begun
    assert {messages[-1].error.code for messages in begun} == {grpc.StatusCode.DEADLINE_EXCEEDED.value[0]}
    await serving.wait_until_idle()


async def test_clients_that_read_nothing_cost_a_text_each_and_slow_nobody(serving: Serving) -> None:
    process = psutil.Process(serving.process_id)
    await read(serving.stream(tokens=50))
    before = process.memory_info().rss
    # With so many log-probabilities an answer is several times what gRPC holds for a reader (64 KiB): the rest waits in the engine.
    sleepers = [serving.stream(tokens=490, logprobs=20) for _ in range(LIMITS.max_rows - 1)]
    reader = await asyncio.wait_for(read(serving.stream(tokens=490)), 30)
    assert reader[-1].finished.usage.completion_tokens == 490
    await serving.wait_until_idle()
    assert process.memory_info().rss - before < 64 * MEBIBYTE
    for sleeper in sleepers:
        messages = await read(sleeper)
        assert messages[-1].finished.usage.completion_tokens == 490
        assert sum(len(message.delta.logprobs) for message in messages) == 490
        assert len(messages) < 490, "what waited came as one"


async def test_a_prompt_of_a_million_characters_is_refused_with_its_figures_while_others_go_on(serving: Serving) -> None:
    steady = aiter(serving.stream(tokens=450))
    await anext(steady)
    with pytest.raises(aio.AioRpcError) as refused:
        await serving.stub.Generate(pb.GenerateRequest(**write_ask(8, prompt="maps and houses " * 62_500)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the model's context is 512" in str(refused.value.details())
    assert (await read(steady))[-1].finished.usage.completion_tokens == 450


async def test_memory_that_runs_out_while_loading_fails_that_model_only(serving: Serving) -> None:
    await read(serving.stream(tokens=2))
    used = psutil.Process(serving.process_id).memory_info().vms
    limits = resource.prlimit(serving.process_id, resource.RLIMIT_AS)
    resource.prlimit(serving.process_id, resource.RLIMIT_AS, (used + 200 * MEBIBYTE, limits[1]))
    try:
        steady = serving.stream(tokens=300)
        with pytest.raises(aio.AioRpcError) as refused:
            await serving.stub.Generate(pb.GenerateRequest(**write_ask(8, model="large")))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no memory" in str(refused.value.details())
        assert (await read(steady))[-1].finished.usage.completion_tokens == 300
    finally:
        resource.prlimit(serving.process_id, resource.RLIMIT_AS, limits)
    start = time.monotonic()
    assert (await serving.stub.Generate(pb.GenerateRequest(**write_ask(2, model="large")))).usage.completion_tokens == 2
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
    messages = await read(serving.stub.StreamGenerate(request))
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


async def _read_to_failure(call: Any) -> tuple[list[Any], aio.AioRpcError]:
    messages = []
    try:
        async for message in call:
            messages.append(message)
    except aio.AioRpcError as error:
        return messages, error
    raise AssertionError("the stream ended well")
