"""What every implementation of the Engine port keeps, whatever computes behind it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from server.domain.errors import FailedPrecondition, InvalidInput, NotFound
from server.domain.generation import (
    Delta,
    FinishReason,
    GenerationFinished,
    GenerationRequest,
    ModelReference,
    OutputConstraint,
    TokenEvent,
)
from server.services.model_ports import Generator
from tests.inference.asking import ask, ask_chat, collect
from tests.inference.contract.conftest import BASE, BROKEN, VERSIONS, Subject
from tests.tiny_models import CONTEXT_TOKENS

PROMPT = "The river town keeps"


@pytest.fixture
def engine(subject: Subject) -> Generator:
    return subject.engine


def ask_of(model: ModelReference, prompt: str = PROMPT, **parameters: object) -> GenerationRequest:
    return replace(ask(prompt, **parameters), model=model)  # type: ignore[arg-type]  # ask's own names are not among them


async def list_events(events: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    return [event async for event in events]


async def test_a_stream_is_deltas_and_one_end(engine: Generator) -> None:
    events = await list_events(engine.generate(ask(PROMPT, max_tokens=12)))
    assert all(isinstance(event, Delta) for event in events[:-1])
    end = events[-1]
    assert isinstance(end, GenerationFinished)
    assert (end.finish_reason, end.usage.completion_tokens, end.max_tokens) == (FinishReason.LENGTH, 12, 12)
    assert end.usage.prompt_tokens == (await engine.count_tokens(BASE, [PROMPT]))[0]
    plain, broken = await engine.quote_texts(BASE, [PROMPT, "end<|im_end|>"])
    assert (plain.text, plain.token_count, broken.text) == (PROMPT, end.usage.prompt_tokens, "end< |im_end|>")
    assert 0 <= end.timings.queue_seconds <= end.timings.first_token_seconds <= end.timings.total_seconds


async def test_greedy_is_greedy_and_a_seed_repeats_a_sample(engine: Generator) -> None:
    greedy = [await collect(engine.generate(ask(PROMPT))) for _ in range(2)]
    assert greedy[0].text == greedy[1].text
    sampled = [await collect(engine.generate(ask(PROMPT, temperature=1.5, seed=seed, max_tokens=24))) for seed in (3, 3, 4)]
    assert sampled[0].text == sampled[1].text != sampled[2].text
    assert [answer.end.seed for answer in sampled] == [3, 3, 4]


async def test_messages_go_through_the_chat_template(engine: Generator) -> None:
    chat, plain = [await collect(engine.generate(request)) for request in (ask_chat("Hello"), ask("Hello"))]
    assert chat.end.usage.prompt_tokens > plain.end.usage.prompt_tokens


async def test_a_stop_string_is_never_shown(engine: Generator) -> None:
    whole = (await collect(engine.generate(ask(PROMPT, max_tokens=24)))).text
    stop = whole[5:9]
    answer = await collect(engine.generate(ask(PROMPT, max_tokens=24, stop=(stop,))))
    assert (answer.text, answer.end.finish_reason) == (whole[: whole.index(stop)], FinishReason.STOP_STRING)


async def test_log_probabilities_come_for_each_token(engine: Generator) -> None:
    answer = await collect(engine.generate(ask(PROMPT, max_tokens=6, logprobs=3)))
    positions = [position for delta in answer.deltas for position in delta.logprobs]
    assert len(positions) == 6
    assert all(position.chosen == position.top[0] and len(position.top) == 3 for position in positions)


async def test_versions_and_their_base_answer_side_by_side_each_for_itself(subject: Subject) -> None:
    engine, models = subject.engine, [BASE, *VERSIONS]
    alone = {model: (await collect(engine.generate(ask_of(model)))).text for model in models}
    assert len(set(alone.values())) == len(models), "each version says something else"
    mixed = models * 2 if subject.mixes_base else [*VERSIONS] * 3
    together = await asyncio.gather(*(collect(engine.generate(ask_of(model))) for model in mixed))
    assert [answer.text for answer in together] == [alone[model] for model in mixed]
    assert (await collect(engine.generate(ask_of(BASE)))).text == alone[BASE]


async def test_a_bad_version_fails_its_own_requests_only(engine: Generator) -> None:
    requests = [ask_of(model) for model in (BROKEN, BASE, VERSIONS[0], BROKEN)]
    results = await asyncio.gather(*(collect(engine.generate(request)) for request in requests), return_exceptions=True)
    assert [isinstance(result, FailedPrecondition) for result in results] == [True, False, False, True]
    assert "mdl_broken" in (await engine.describe()).quarantined


async def test_closing_a_stream_cancels_it(engine: Generator) -> None:
    async with aclosing(engine.generate(ask(PROMPT, max_tokens=450))) as events:
        await anext(events)
    async with asyncio.timeout(5):
        while any(model.running_requests for model in (await engine.describe()).models):  # noqa: ASYNC110  # polled
            await asyncio.sleep(0.01)
    assert (await collect(engine.generate(ask(PROMPT)))).text


async def test_what_is_wrong_with_a_request_is_typed_and_comes_before_any_token(engine: Generator) -> None:
    with pytest.raises(InvalidInput) as long:
        await list_events(engine.generate(ask("maps " * CONTEXT_TOKENS)))
    assert (long.value.reason, long.value.data.violations[0].field) == ("PROMPT_TOO_LONG", "prompt")
    with pytest.raises(NotFound):
        await list_events(engine.generate(ask(PROMPT, model="nowhere")))
    assert await engine.read_context_tokens(BASE) == CONTEXT_TOKENS


async def test_a_rendered_prompt_is_what_a_generation_reads(engine: Generator) -> None:
    request = ask_chat("Hello", max_tokens=2)
    rendered = await engine.render(request)
    answer = await collect(engine.generate(replace(request, echo_prompt=True)))
    assert answer.end.rendered_prompt == rendered.text
    assert (answer.end.usage.prompt_tokens, rendered.context_tokens) == (len(rendered.token_ids), CONTEXT_TOKENS)


async def test_output_keeps_to_a_form(engine: Generator) -> None:
    answer = await collect(engine.generate(ask(PROMPT, constraint=OutputConstraint(regex="(yes|no)"), max_tokens=CONTEXT_TOKENS)))
    assert answer.text in ("yes", "no")
    assert answer.end.max_tokens == CONTEXT_TOKENS - answer.end.usage.prompt_tokens, "what the prompt leaves"
    with pytest.raises(InvalidInput):
        await collect(engine.generate(ask(PROMPT, constraint=OutputConstraint(json_schema='{"type": "strang"}'))))


async def test_loading_ahead_and_unloading_change_no_answer(engine: Generator) -> None:
    version = VERSIONS[1]
    await engine.load(version, pinned=True)
    before = (await collect(engine.generate(ask_of(version)))).text
    async with aclosing(engine.generate(ask_of(version, max_tokens=60))) as running:
        await anext(running)
        await engine.unload(version)
        assert len(await list_events(running)) >= 1, "what runs ends undisturbed"
    assert (await collect(engine.generate(ask_of(version)))).text == before
    await engine.forget(version.model_id)
    assert (await collect(engine.generate(ask_of(version)))).text == before


async def test_an_engine_tells_what_it_holds_under_a_name_that_stays(engine: Generator) -> None:
    await engine.load(BASE)
    first, second = await engine.describe(), await engine.describe()
    assert first.instance == second.instance
    assert any(model.base_model == BASE.base_model and model.context_tokens == CONTEXT_TOKENS for model in first.models)
