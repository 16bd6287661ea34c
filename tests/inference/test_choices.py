"""Choices of one answer: their prompt is read once, and each says what it would say alone, whoever leaves, fails, or comes late."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from server.domain.generation import GenerationParameters, OutputConstraint
from server.inference.batching import BatchLimits
from server.inference.generations import Generation
from server.inference.library import LoadedModel
from server.inference.sampling import SamplingState
from tests.inference.batches import LIMITS, Recorder, load, make_generation, make_prompts, reference_tokens

PROMPT = make_prompts(2, 64)[1]
READING_STEPS = 64 // LIMITS.prompt_tokens_per_step
GREEDY: Mapping[str, object] = {"temperature": 0.0}
TELLING: Sequence[Mapping[str, object]] = (
    {"temperature": 1.2},
    {"temperature": 1.2},
    GREEDY,
    {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": dict.fromkeys(range(40, 44), 100.0), "frequency_penalty": 2.0},
    {"temperature": 1.0, "constraint": OutputConstraint(regex="[a-f ]{40}")},
)


@dataclass
class Said:
    """What a choice says: its tokens, and their log probabilities, which also tell apart what tiny models say alike."""

    tokens: Sequence[int]
    logprobs: Sequence[float]

    def __eq__(self, other: object) -> bool:
        """Tell whether both are the same but for rounding."""
        assert isinstance(other, Said)
        return list(self.tokens) == list(other.tokens) and list(self.logprobs) == pytest.approx(other.logprobs, abs=1e-4)


def make_choices(model: LoadedModel, *parameters: Mapping[str, object]) -> list[Generation]:
    return [make_choice(model, seed, given) for seed, given in enumerate(parameters)]


def make_choice(model: LoadedModel, seed: int, given: Mapping[str, object]) -> Generation:
    generation = make_generation(model, list(PROMPT), 12)
    parameters = GenerationParameters(**{"logprobs": 0, **given})  # type: ignore[arg-type]
    form = None if parameters.constraint is None else model.voice.forms.read(parameters.constraint)
    generation.sampling = SamplingState(parameters, seed, PROMPT, form)
    generation.choice_of = "an answer"
    return generation


def begin(model: LoadedModel, *generations: Generation) -> Recorder:
    for generation in generations:
        model.batch.submit(generation)
    return Recorder(generations)


def finish(model: LoadedModel, recorder: Recorder) -> list[Said]:
    while model.batch.has_work:
        recorder.take(model.batch)
    return [Said(recorder.tokens[g.request_id], recorder.logprobs[g.request_id]) for g in recorder.watched]


def say_alone(model: LoadedModel, *generations: Generation) -> list[Said]:
    return [finish(model, begin(model, generation))[0] for generation in generations]


def step(model: LoadedModel, recorder: Recorder, steps: int) -> list[int]:
    """Give how many tokens each has after so many steps more."""
    for _ in range(steps):
        recorder.take(model.batch)
    return [len(recorder.tokens[g.request_id]) for g in recorder.watched]


def test_choices_start_together_once_one_has_read_and_each_says_what_it_says_alone(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    alone = say_alone(model, *make_choices(model, *TELLING))
    recorder = begin(model, *make_choices(model, *TELLING))
    assert step(model, recorder, READING_STEPS - 1) == [0] * len(TELLING)
    assert step(model, recorder, 1) == [1] * len(TELLING)
    assert finish(model, recorder) == alone
    assert len({tuple(said.tokens) for said in alone}) == len(alone), "each must show that its own sampling counts"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "falcon"])
def test_greedy_choices_say_what_separate_requests_say(family: str, tiny: Callable[[str], Path]) -> None:
    model = load(tiny(family))
    (alone,) = say_alone(model, make_choice(model, 0, GREEDY))
    assert alone.tokens == reference_tokens(tiny(family), PROMPT, 12)
    assert finish(model, begin(model, *make_choices(model, *[GREEDY] * 4))) == [alone] * 4


def test_choices_over_virtual_tokens_start_from_both(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    shape = model.decoder.cache_shape
    prefix = torch.randn(shape.layers, 2 * shape.key_value_heads, 5, shape.head_size, generator=torch.Generator().manual_seed(1))
    with_prefix, bare = make_choices(model, GREEDY, GREEDY)
    with_prefix.prefix = prefix
    alone = say_alone(model, with_prefix, bare)
    assert alone[0] != alone[1]
    choices = make_choices(model, *[GREEDY] * 4)
    for choice in choices[:2]:
        choice.prefix = prefix
    assert finish(model, begin(model, *choices)) == [alone[0], alone[0], alone[1], alone[1]]


def test_a_choice_that_comes_late_starts_from_one_that_has_read(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    (alone,) = say_alone(model, make_choice(model, 0, GREEDY))
    first, late, stranger = make_choices(model, *[GREEDY] * 3)
    stranger.choice_of = "another answer"
    recorder = begin(model, first)
    step(model, recorder, READING_STEPS + 5)
    others = begin(model, late, stranger)
    assert step(model, others, 1) == [1, 0]
    assert stranger.cached_tokens == LIMITS.prompt_tokens_per_step, "the late one takes no part of what is read"
    assert finish(model, others) == [alone, alone]


def test_a_reader_whose_first_token_is_its_last_has_read_for_all(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    (alone,) = say_alone(model, make_choice(model, 0, GREEDY))
    reader, *others = make_choices(model, *[GREEDY] * 3)
    reader.max_new_tokens = 1
    recorder = begin(model, reader, *others)
    assert step(model, recorder, READING_STEPS) == [1, 1, 1]
    assert finish(model, recorder) == [Said(alone.tokens[:1], alone.logprobs[:1]), alone, alone]


def test_where_the_reader_is_cancelled_another_reads(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    (alone,) = say_alone(model, make_choice(model, 0, GREEDY))
    recorder = begin(model, *make_choices(model, *[GREEDY] * 3))
    step(model, recorder, READING_STEPS - 1)
    assert model.batch.cancel(recorder.watched[0].request_id)
    # From the beginning, for both.
    assert step(model, recorder, READING_STEPS - 1) == [0, 0, 0]
    assert step(model, recorder, 1) == [0, 1, 1]
    assert finish(model, recorder)[1:] == [alone, alone]


def test_choices_that_are_all_cancelled_while_one_reads_leave_nothing_behind(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    (alone,) = say_alone(model, make_choice(model, 0, GREEDY))
    recorder = begin(model, *make_choices(model, *[GREEDY] * 4))
    step(model, recorder, 1)
    assert model.batch.running_count == 4
    for choice in recorder.watched:
        assert model.batch.cancel(choice.request_id)
    assert (model.batch.has_work, model.batch.reserved_tokens) == (False, 0)
    assert say_alone(model, make_choice(model, 0, GREEDY)) == [alone]


def test_a_reader_that_fails_fails_alone_and_a_prompt_that_cannot_be_read_fails_all(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    (alone,) = say_alone(model, make_choice(model, 0, GREEDY))
    reader, second, *bad = make_choices(model, {"logit_bias": {10**6: 1.0}}, *[GREEDY] * 4)
    for generation in bad:
        generation.prompt_ids, generation.choice_of = [*PROMPT, 10**6], "an answer that cannot be"
    recorder = begin(model, reader, *bad, second)
    assert finish(model, recorder)[-1] == alone
    assert set(recorder.errors) == {generation.request_id for generation in (reader, *bad)}
    assert model.batch.reserved_tokens == 0


def test_more_choices_than_rows_are_all_served(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"), BatchLimits(max_rows=2, max_waiting=8, cache_tokens=160, prompt_tokens_per_step=16))
    (alone,) = say_alone(model, make_choice(model, 0, GREEDY))
    choices = make_choices(model, *[GREEDY] * 7)
    for choice, tokens in zip(choices, (12, 3, 1, 8, 2, 12, 5), strict=True):
        choice.max_new_tokens = tokens
    said = finish(model, begin(model, *choices))
    assert said == [Said(alone.tokens[: choice.max_new_tokens], alone.logprobs[: choice.max_new_tokens]) for choice in choices]
