"""Several answers, limits of time and whole answers, over a real engine with a tiny model."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.domain.errors import DeadlineExceeded, InvalidInput
from server.domain.generation import GenerationRequest, ModelReference
from server.inference.engine import EmbeddedEngine
from server.services.generating import AnswerFinished, ChoiceDelta, Generation, collect, generate_choices, limit_time
from tests.inference.asking import ask
from tests.inference.engines import make_engine
from tests.tiny_models import CONTEXT_TOKENS, build_tiny_causal_model

LLAMA = ModelReference("llama", "llama")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build_tiny_causal_model(tmp_path_factory.mktemp("generating"))
    torch.set_num_threads(threads)


@pytest.fixture
async def engine(model: Path, tmp_path: Path) -> AsyncIterator[EmbeddedEngine]:
    made = make_engine({"llama": model}, tmp_path)
    made.start()
    yield made
    await made.stop()


async def answer(engine: EmbeddedEngine, request: GenerationRequest) -> Generation:
    return await collect(LLAMA, generate_choices(engine, request))


async def count_running(engine: EmbeddedEngine) -> int:
    return sum(model.running_requests + model.waiting_requests for model in (await engine.describe()).models)


async def test_each_answer_has_a_seed_by_which_it_can_be_repeated_alone(engine: EmbeddedEngine) -> None:
    request = ask("The river", temperature=1.5, seed=2**31 - 2, n=4, max_tokens=20)
    given = await answer(engine, request)
    assert [choice.finished.seed for choice in given.choices] == [2**31 - 2, 2**31 - 1, 0, 1]
    assert len({choice.text for choice in given.choices}) > 1
    for choice in given.choices:
        alone = await answer(engine, replace(request, parameters=replace(request.parameters, n=1, seed=choice.finished.seed)))
        assert [alone.choices[0].text] == [choice.text]
    assert given.finished.usage.completion_tokens == sum(choice.finished.usage.completion_tokens for choice in given.choices)
    assert given.finished.usage.prompt_tokens == given.choices[0].finished.usage.prompt_tokens


async def test_the_parameters_that_counted_repeat_an_answer_with_a_drawn_seed(engine: EmbeddedEngine) -> None:
    request = ask("The river", temperature=1.5, n=3, max_tokens=None)
    drawn = await answer(engine, request)
    used = drawn.finished.parameters
    prompt_tokens = drawn.finished.usage.prompt_tokens
    assert used == replace(request.parameters, seed=drawn.choices[0].finished.seed, max_tokens=CONTEXT_TOKENS - prompt_tokens)
    assert len({choice.finished.seed for choice in drawn.choices}) == 3
    again = await answer(engine, replace(request, parameters=used))
    assert [choice.text for choice in again.choices] == [choice.text for choice in drawn.choices]


async def test_pieces_of_several_answers_come_as_they_are_made(engine: EmbeddedEngine) -> None:
    order: list[int] = []
    async for event in generate_choices(engine, ask("The river", temperature=1.0, n=3, max_tokens=30)):
        if isinstance(event, ChoiceDelta):
            order.append(event.choice)
    assert isinstance(event, AnswerFinished)
    assert order != sorted(order), "one after the other would be in order"


async def test_one_refusal_is_the_answer_and_leaving_frees_every_place(engine: EmbeddedEngine) -> None:
    with pytest.raises(InvalidInput):
        await answer(engine, ask("maps " * 600, temperature=1.0, n=3))
    async with aclosing(generate_choices(engine, ask("The river", temperature=1.0, n=3, max_tokens=450))) as events:
        seen: set[int] = set()
        while len(seen) < 3:
            event = await anext(events)
            assert isinstance(event, ChoiceDelta)
            seen.add(event.choice)
        assert await count_running(engine) == 3
    async with asyncio.timeout(5):
        while await count_running(engine):  # noqa: ASYNC110  # the engine's status is polled, as a caller would
            await asyncio.sleep(0.01)


async def test_a_generation_over_its_time_ends_typed_and_frees_its_place(engine: EmbeddedEngine) -> None:
    await engine.load(LLAMA)
    with pytest.raises(DeadlineExceeded) as late:
        await collect(LLAMA, limit_time(generate_choices(engine, ask("The river", max_tokens=490)), 0.1))
    assert late.value.reason == "GENERATION_TIMED_OUT"
    async with asyncio.timeout(5):
        while await count_running(engine):  # noqa: ASYNC110  # the engine's status is polled, as a caller would
            await asyncio.sleep(0.01)
    in_time = await collect(LLAMA, limit_time(generate_choices(engine, ask("The river", max_tokens=3)), 30))
    assert in_time.finished.usage.completion_tokens == 3
