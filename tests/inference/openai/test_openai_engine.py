"""What goes over the wire to a server behind a URL, and what becomes of everything that can go wrong there."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, ResourceExhausted, ServiceError, Unavailable, Unimplemented
from server.domain.generation import FinishReason, ModelReference, OutputConstraint, Priority
from server.inference.openai.dialects import Dialect
from server.inference.openai.engine import OpenAIEngine
from tests.inference.asking import ask, ask_chat, collect
from tests.inference.openai.completion_server import (
    DONE,
    CompletionServer,
    answer_with,
    run_server,
    write_error,
    write_event,
    write_usage,
)
from tests.inference.openai.conftest import MAX_REQUESTS, MakeEngine
from tests.inference.versions import make_version

LLAMA = ModelReference("llama", "llama")
EVERYTHING: dict[str, Any] = {
    "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": (7,), "constraint": OutputConstraint(regex="a+"),
}  # fmt: skip


async def test_the_prompt_goes_as_our_own_tokens_and_every_parameter_by_name(
    openai_engine: OpenAIEngine, completions: CompletionServer
) -> None:
    request = replace(ask_chat("Hello", seed=4, logprobs=2, logit_bias={9: 1.5}, **EVERYTHING), priority=Priority.HIGH)
    completions.pieces = answer_with("")
    await collect(openai_engine.generate(request))
    rendered = await openai_engine.render(request)
    assert completions.bodies[0] == {
        "model": "llama", "prompt": list(rendered.token_ids), "max_tokens": 16, "temperature": 0.0, "top_p": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "seed": 4, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "logit_bias": {"9": 1.5}, "logprobs": 2, "return_tokens_as_token_ids": True, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
        "stop_token_ids": completions.bodies[0]["stop_token_ids"], "priority": -1, "structured_outputs": {"regex": "a+"},
    }  # fmt: skip
    assert completions.bodies[0]["stop_token_ids"] == [1, 7], "the template's end of a turn, and the caller's"


async def test_a_server_of_another_kind_is_refused_by_name_what_it_would_ignore(
    make_openai_engine: MakeEngine, completions: CompletionServer
) -> None:
    completions.owner = "somebody"
    plain = make_openai_engine(completions.url)
    with pytest.raises(Unimplemented) as refused:
        await collect(plain.generate(replace(ask("maps", **EVERYTHING), priority=Priority.LOW)))
    assert [violation.field for violation in refused.value.data.violations] == [
        *(f"parameters.{name}" for name in EVERYTHING), "priority",
    ]  # fmt: skip
    assert not completions.bodies
    await collect(plain.generate(ask("maps", stop=("x",))))
    assert completions.bodies[0]["stop"] == ["x"]
    assert "top_k" not in completions.bodies[0]
    completions.owner = "sglang"
    await collect(make_openai_engine(completions.url).generate(ask("maps", constraint=OutputConstraint(json_schema='{"type": "null"}'))))
    assert completions.bodies[1]["json_schema"] == '{"type": "null"}'
    await collect(make_openai_engine(completions.url, dialect=Dialect.VLLM).generate(ask("maps", top_k=3)))
    assert (completions.bodies[2]["top_k"], completions.bodies[2]["min_p"]) == (3, 0.0)


async def test_a_stop_string_is_found_here_and_its_log_probabilities_are_not_told(
    openai_engine: OpenAIEngine, completions: CompletionServer
) -> None:
    def write(text: str, completed: int) -> bytes:
        logprobs = {"tokens": ["token_id:5"], "token_logprobs": [-1.0], "top_logprobs": [{"token_id:6": -0.5, "token_id:5": -1.0}]}
        return write_event(text, completed=completed, logprobs=logprobs)

    completions.pieces = [write(text, place) for place, text in enumerate(["So ", "EN", "D", " more"], 1)]
    answer = await collect(openai_engine.generate(ask("maps", stop=("END",), logprobs=1)))
    assert (answer.text, answer.end.finish_reason, answer.end.usage.completion_tokens) == ("So ", FinishReason.STOP_STRING, 3)
    positions = [position for delta in answer.deltas for position in delta.logprobs]
    assert [(position.chosen.logprob, [top.logprob for top in position.top]) for position in positions] == [(-1.0, [-0.5])]
    assert positions[0].chosen.token == "$", "named by our tokenizer"  # noqa: S105


@pytest.mark.parametrize(
    ("finish", "stop", "expected"),
    [
        ("stop", None, FinishReason.STOP),
        ("stop", 1, FinishReason.STOP),
        ("stop", 7, FinishReason.STOP_TOKEN),
        ("length", None, FinishReason.LENGTH),
    ],
)
async def test_each_end_has_its_name(
    finish: str, stop: int | None, expected: FinishReason, openai_engine: OpenAIEngine, completions: CompletionServer
) -> None:
    completions.pieces = [write_event("yes"), write_event("", completed=2, finish=finish, stop=stop), write_usage(2), DONE]
    end = (await collect(openai_engine.generate(ask("maps", stop_token_ids=(7,))))).end
    assert (end.finish_reason, end.usage.completion_tokens) == (expected, 2)


async def test_events_may_come_in_any_pieces_and_between_comments(openai_engine: OpenAIEngine, completions: CompletionServer) -> None:
    whole = b": alive\r\n\r\n" + b"".join(answer_with("الخرائط", " maps")).replace(b"\n", b"\r\n")
    completions.pieces = [whole[place : place + 3] for place in range(0, len(whole), 3)]
    assert (await collect(openai_engine.generate(ask("maps")))).text == "الخرائط maps"


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([write_event("half"), b'data: {"choices": [{"te'], "ENGINE_LOST"),
        ([write_event("half"), DONE], "ENGINE_LOST"),
        ([write_event("all", finish="length").replace(b'"usage"', b'"waste"'), DONE], "ENGINE_LOST"),
        ([write_event("half"), b"data: no JSON\n\n"], "ENGINE_FAILED"),
        ([write_event("half"), b"data: " + b"x" * (2 << 20)], "ENGINE_FAILED"),
        ([b'data: {"error": {"message": "EngineCore died at /secret", "code": 500}}\n\n', DONE], "ENGINE_FAILED"),
        ([write_event("half"), write_event("", finish="abort"), write_usage(2), DONE], "GENERATION_FAILED"),
    ],
    ids=["cut event", "no end", "no usage", "no JSON", "endless event", "error in the stream", "aborted"],
)
async def test_a_stream_that_breaks_the_protocol_fails_its_own_request(
    pieces: list[bytes], reason: str, openai_engine: OpenAIEngine, completions: CompletionServer
) -> None:
    completions.pieces = pieces
    with pytest.raises(Unavailable) as failed:
        await collect(openai_engine.generate(ask("maps")))
    assert failed.value.reason == reason
    assert "secret" not in str(failed.value)
    completions.pieces = answer_with("well")
    assert (await collect(openai_engine.generate(ask("maps")))).text == "well"


async def test_a_connection_that_is_cut_says_when_to_try_again(openai_engine: OpenAIEngine, completions: CompletionServer) -> None:
    completions.pieces, completions.is_cut = [write_event("half")], True
    with pytest.raises(Unavailable) as lost:
        await collect(openai_engine.generate(ask("maps")))
    assert (lost.value.reason, lost.value.data.retry_after_seconds) == ("ENGINE_LOST", 5.0)


async def test_a_server_that_falls_silent_is_given_up(openai_engine: OpenAIEngine, completions: CompletionServer) -> None:
    completions.pieces = None
    with pytest.raises(Unavailable) as silent:
        await collect(openai_engine.generate(ask("maps")))
    assert silent.value.reason == "ENGINE_SILENT"


@pytest.mark.parametrize(
    ("status", "body", "expected", "reason"),
    [
        (400, write_error("logit_bias is too large", 400), InvalidInput, "REFUSED_BY_ENGINE"),
        (401, {"error": "Unauthorized"}, Unavailable, "ENGINE_KEY_REFUSED"),
        (429, write_error("too many", 429), ResourceExhausted, "QUEUE_FULL"),
        (500, write_error("CUDA error in /secret", 500), Unavailable, "ENGINE_FAILED"),
        (503, {}, Unavailable, "ENGINE_UNAVAILABLE"),
    ],
)
async def test_a_refusal_is_a_typed_error(
    status: int, body: dict[str, Any], expected: type[ServiceError], reason: str, openai_engine: OpenAIEngine, completions: CompletionServer
) -> None:
    completions.status, completions.refusal, completions.headers = status, body, {"retry-after": "7"}
    with pytest.raises(expected) as refused:
        await collect(openai_engine.generate(ask("maps")))
    assert refused.value.reason == reason
    assert ("logit_bias is too large" in str(refused.value)) == (status == 400), "its words are shown where they are about the request"
    assert "secret" not in str(refused.value)
    if status in (429, 503):
        assert refused.value.data.retry_after_seconds == 7


async def test_a_server_that_is_not_there_is_unavailable_until_it_is(make_openai_engine: MakeEngine) -> None:
    async with run_server(CompletionServer()) as server:
        engine, port = make_openai_engine(server.url), int(server.url.rpartition(":")[2])
        first = (await engine.describe()).instance
        assert (await engine.describe()).instance == first
    for call in (collect(engine.generate(ask("maps"))), engine.describe()):
        with pytest.raises(Unavailable) as down:
            await call
        assert (down.value.reason, down.value.data.retry_after_seconds) == ("ENGINE_UNAVAILABLE", 5.0)
    async with run_server(CompletionServer(), port):
        assert (await collect(engine.generate(ask("maps")))).text == "one two"
        assert (await engine.describe()).instance != first


async def test_leaving_closes_the_connection_and_frees_the_place(openai_engine: OpenAIEngine, completions: CompletionServer) -> None:
    completions.pieces = None
    async with aclosing(openai_engine.generate(ask("maps"))) as events:
        await anext(events)
        assert (await openai_engine.describe()).models[0].running_requests == 1
    async with asyncio.timeout(5):
        await completions.gone.wait()
    assert (await openai_engine.describe()).models[0].running_requests == 0


async def test_requests_over_the_bound_are_refused_and_not_queued(openai_engine: OpenAIEngine, completions: CompletionServer) -> None:
    completions.pieces = None
    streams = [openai_engine.generate(ask("maps")) for _ in range(MAX_REQUESTS)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(ResourceExhausted) as full:
        await collect(openai_engine.generate(ask("maps")))
    assert full.value.reason == "QUEUE_FULL"
    for stream in streams:
        await stream.aclose()
    completions.pieces = answer_with("free")
    assert (await collect(openai_engine.generate(ask("maps")))).text == "free"


async def test_a_base_model_that_is_not_served_is_named_with_those_that_are(openai_engine: OpenAIEngine) -> None:
    with pytest.raises(NotFound, match="It serves: llama") as refused:
        await collect(openai_engine.generate(ask("maps", model="elsewhere")))
    assert refused.value.reason == "MODEL_NOT_SERVED"
    assert await openai_engine.read_context_tokens(LLAMA) == 200, "the server's bound, not the model's"


async def test_the_key_goes_with_every_call(make_openai_engine: MakeEngine, completions: CompletionServer) -> None:
    await make_openai_engine(f"{completions.url}/v1/", api_key="abc").describe()
    assert completions.keys == ["Bearer abc"]


async def test_an_adapter_is_given_once_and_again_to_a_server_that_forgot_it(
    openai_engine: OpenAIEngine, completions: CompletionServer, tiny: Any, tmp_path: Path
) -> None:
    make_version(tmp_path, "version", tiny("llama"), "lora")
    request = ask("maps", adapter="version")
    for _ in range(2):
        await collect(openai_engine.generate(request))
    [(name, path)] = completions.adapters.items()
    assert path == str(tmp_path / "version")
    assert {body["model"] for body in completions.bodies} == {name}
    completions.adapters.clear()
    assert (await collect(openai_engine.generate(request))).text == "one two"
    assert list(completions.adapters) == [name]
    await openai_engine.forget("mdl_tiny")
    assert not completions.adapters
    completions.adapters[name] = path
    assert (await collect(openai_engine.generate(request))).text == "one two", "one that it has already is as good"


async def test_a_version_that_the_server_cannot_serve_is_refused_with_the_reason(
    openai_engine: OpenAIEngine, completions: CompletionServer, tiny: Any, tmp_path: Path
) -> None:
    for technique, why in (("dora", "LoRA adapters"), ("ia3", "LoRA adapters"), ("full", "LoRA adapters"), ("vera", "VERA")):
        make_version(tmp_path, technique, tiny("llama"), technique)
        with pytest.raises(Unimplemented, match=why) as refused:
            await collect(openai_engine.generate(ask("maps", adapter=technique)))
        assert refused.value.reason == "ADAPTER_NOT_SUPPORTED"
    make_version(tmp_path, "quantised", tiny("llama"), "lora", described={"quantization": "NF4"})
    with pytest.raises(Unimplemented, match="weights in NF4"):
        await collect(openai_engine.generate(ask("maps", adapter="quantised")))
    make_version(tmp_path, "version", tiny("llama"), "lora")
    completions.has_adapters = False
    with pytest.raises(FailedPrecondition, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING") as alone:
        await collect(openai_engine.generate(ask("maps", adapter="version")))
    assert alone.value.reason == "ADAPTERS_NOT_SUPPORTED"
