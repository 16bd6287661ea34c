"""Sampling against transformers' own processors, its independence of the batch, and penalties."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.domain.generation import GenerationParameters
from server.inference.sampling import SamplingState, choose_tokens, keep_candidates

VOCABULARY = 3000


def make_state(seed: int = 1, prompt_ids: Sequence[int] = (), **parameters: object) -> SamplingState:
    return SamplingState(GenerationParameters(**parameters), seed, prompt_ids)  # type: ignore[arg-type]


def make_logits(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.9999, 0.0), (0, 1.0, 0.1), (50, 0.8, 0.05), (1, 0.01, 1.0)],
)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_the_same_tokens_stay_as_in_transformers(top_k: int, top_p: float, min_p: float, spread: float) -> None:
    logits, parameters = make_logits(3, spread=spread), GenerationParameters(top_k=top_k, top_p=top_p, min_p=min_p)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    ids: Any = torch.zeros(3, 1, dtype=torch.long)
    expected = warpers(ids, cast(Any, logits.clone()))
    ours = keep_candidates(logits / 0.8, [parameters] * 3)
    differ = torch.isfinite(ours) != torch.isfinite(expected)
    # One token more or less at the very border of the sum is rounding, and so are a few that are hardly likely.
    assert differ.sum() <= 1 or torch.softmax(logits / 0.8, -1)[differ].sum() < 1e-5


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    logits = make_logits(4)
    alone, among = make_state(7, temperature=1.0), make_state(7, temperature=1.0)
    others = [make_state(1, temperature=2.0), make_state(2, temperature=0.0), make_state(3, temperature=1.0, top_p=0.5)]
    first = [choose_tokens(logits[:1], [alone])[0].token_id for _ in range(20)]
    rows = torch.cat((logits[1:3], logits[:1], logits[3:]))
    second = [choose_tokens(rows, [others[0], others[1], among, others[2]])[2].token_id for _ in range(20)]
    assert first == second
    assert len(set(first)) > 5
    different = make_state(8, temperature=1.0)
    assert [choose_tokens(logits[:1], [different])[0].token_id for _ in range(20)] != first


def test_sampled_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    state = make_state(3, temperature=1.0)
    drawn = Counter(choose_tokens(logits, [state])[0].token_id for _ in range(3000))
    expected = torch.softmax(logits, -1)[0]
    assert set(drawn) == {0, 1, 2}
    for token in range(3):
        assert abs(drawn[token] / 3000 - float(expected[token])) < 0.03


def test_temperature_zero_and_nearly_zero_take_the_likeliest() -> None:
    logits = make_logits(2)
    best = logits.argmax(-1).tolist()
    states = [make_state(temperature=0.0), make_state(temperature=1e-9)]
    assert [choice.token_id for choice in choose_tokens(logits, states)] == best


def test_repetition_penalty_is_that_of_transformers_and_counts_the_prompt() -> None:
    logits = make_logits(1)
    state = make_state(temperature=0.0, prompt_ids=[3, 5, 5], repetition_penalty=1.7, logprobs=0)
    state.record(9)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 5, 5, 9]]), logits.clone())
    probe = logits.clone()
    for token in (3, 5, 9):
        probe[0, token] = logits.max() + 0.5
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 5, 5, 9]]), probe.clone())
    assert choose_tokens(probe, [state])[0].token_id == int(expected.argmax())
    assert int(expected.argmax()) not in (3, 5, 9)


def test_presence_and_frequency_penalties_count_what_was_generated_only() -> None:
    logits = torch.tensor([[5.0, 4.9, 4.8, 0.0]])
    presence = make_state(temperature=0.0, prompt_ids=[0, 0, 0], presence_penalty=0.15)
    said = []
    for _ in range(4):
        token = choose_tokens(logits, [presence])[0].token_id
        presence.record(token)
        said.append(token)
    assert said == [0, 1, 0, 0]
    frequency = make_state(temperature=0.0, frequency_penalty=0.15)
    said = []
    for _ in range(6):
        token = choose_tokens(logits, [frequency])[0].token_id
        frequency.record(token)
        said.append(token)
    assert said == [0, 1, 0, 2, 1, 0]


def test_logprobs_are_those_of_the_model_before_temperature_and_penalties() -> None:
    logits = make_logits(1)
    state = make_state(temperature=2.0, repetition_penalty=2.0, prompt_ids=[1], logprobs=3)
    choice = choose_tokens(logits, [state])[0]
    expected = logits.log_softmax(-1)[0]
    assert choice.logprob == pytest.approx(float(expected[choice.token_id]), abs=1e-5)
    assert [token for token, _ in choice.top] == expected.topk(3).indices.tolist()
    assert choose_tokens(logits, [make_state()])[0].logprob is None


def test_rows_that_are_not_finite_are_told_apart() -> None:
    logits = make_logits(3)
    logits[1, 4] = float("nan")
    choices = choose_tokens(logits, [make_state(temperature=t) for t in (0.0, 1.0, 1.0)])
    assert [choice.token_id < 0 for choice in choices] == [False, True, False]
