"""Batches against transformers' own generate, families one by one; joining, leaving, sharing of prompts, bounds."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from server.domain.errors import ResourceExhausted
from server.domain.generation import FinishReason, GenerationFinished, Priority
from server.inference.batching import BatchLimits
from tests.inference.batches import Recorder, load, make_generation, make_prompts, reference_tokens, run

FAMILIES = ("llama", "mistral", "falcon", "qwen2", "gemma")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_transformers_says_alone(family: str, tiny: Callable[[str], Path]) -> None:
    model = load(tiny(family))
    prompts = make_prompts(5)
    generations = [make_generation(model, prompt) for prompt in prompts]
    said = run(model.batch, *generations)
    for generation, prompt in zip(generations, prompts, strict=True):
        assert said[generation.request_id] == reference_tokens(tiny(family), prompt, 12)


def test_a_sliding_window_hides_what_is_too_far_back(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("mistral"), sliding_window=8)
    model.save_pretrained(tmp_path)
    for file in tiny("mistral").glob("tok*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((tiny("mistral") / "chat_template.jinja").read_bytes())
    loaded = load(tmp_path)
    prompt = make_prompts(2)[1]
    generation = make_generation(loaded, prompt)
    said = run(loaded.batch, generation)[generation.request_id]
    assert said == reference_tokens(tmp_path, prompt, 12)
    assert said != reference_tokens(tiny("mistral"), prompt, 12)


def test_requests_that_join_and_leave_do_not_change_what_others_say(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    prompts = make_prompts(6)
    lengths = [20, 3, 9, 14, 2, 6]
    generations = [make_generation(model, prompt, tokens) for prompt, tokens in zip(prompts, lengths, strict=True)]
    said = Recorder(generations)
    waiting = list(generations)
    while waiting or model.batch.has_work:
        if waiting:
            model.batch.submit(waiting.pop(0))
        said.take(model.batch)
    for generation, prompt, tokens in zip(generations, prompts, lengths, strict=True):
        assert said.tokens[generation.request_id] == reference_tokens(tiny("llama"), prompt, tokens)


def test_a_long_prompt_does_not_stall_the_others(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    short, long = make_generation(model, [5, 6, 7], 30), make_generation(model, make_prompts(2, 200)[1], 2)
    said = Recorder([short, long])
    model.batch.submit(short)
    said.take(model.batch)
    model.batch.submit(long)
    before = len(said.tokens[short.request_id])
    steps = 0
    while not said.tokens[long.request_id]:
        said.take(model.batch)
        steps += 1
    assert steps == -(-200 // 16)
    assert len(said.tokens[short.request_id]) - before == steps


def test_short_prompts_overtake_a_long_one_and_do_not_starve_it(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    long = make_generation(model, make_prompts(2, 100)[1], 1)
    shorts = [make_generation(model, [5, 6, 7, 8], 1) for _ in range(3)]
    for generation in (long, *shorts):
        model.batch.submit(generation)
    model.batch.step()
    model.batch.step()
    assert [g.generated_tokens for g in shorts] == [1, 1, 1]
    assert long.cached_tokens >= 16


def test_cancelling_frees_the_place_before_the_next_step(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    prompts = make_prompts(3)
    first, second, third = (make_generation(model, prompt) for prompt in prompts)
    said = Recorder([first, second, third])
    for generation in (first, second, third):
        model.batch.submit(generation)
    for _ in range(8):
        said.take(model.batch)
    reserved = model.batch.reserved_tokens
    assert model.batch.cancel(first.request_id)
    assert (model.batch.running_count, model.batch.reserved_tokens) == (2, reserved - first.reserved_tokens)
    while model.batch.has_work:
        said.take(model.batch)
    for generation, prompt in ((second, prompts[1]), (third, prompts[2])):
        assert said.tokens[generation.request_id] == reference_tokens(tiny("llama"), prompt, 12)
    assert not model.batch.cancel(first.request_id)


def test_whoever_waits_long_enough_comes_before_a_higher_priority(tiny: Callable[[str], Path]) -> None:
    batch = (model := load(tiny("llama"), BatchLimits(max_rows=1, max_waiting=4, cache_tokens=64))).batch
    old, plain, high = (make_generation(model, [5, 6], 1) for _ in range(3))
    old.priority, plain.priority, high.priority = Priority.LOW, Priority.NORMAL, Priority.HIGH
    old.queued_seconds -= 41
    for generation in (plain, high, old):
        batch.submit(generation)
    assert [batch.step()[-1].generation for _ in range(3)] == [old, high, plain]


def test_the_cache_bound_makes_requests_wait_and_a_full_queue_refuses(tiny: Callable[[str], Path]) -> None:
    limits = BatchLimits(max_rows=3, max_waiting=1, cache_tokens=40)
    model = load(tiny("llama"), limits)
    batch = model.batch
    generations = [make_generation(model, [5] * 10, 10) for _ in range(4)]
    for generation in generations[:2]:
        batch.submit(generation)
    batch.step()
    for generation in generations[2:]:
        batch.submit(generation)
    batch.step()
    assert (batch.running_count, batch.waiting_count, batch.reserved_tokens) == (2, 2, 40)
    with pytest.raises(ResourceExhausted) as refused:
        batch.submit(make_generation(model, [5], 1))
    assert refused.value.reason == "QUEUE_FULL"
    assert refused.value.data.retry_after_seconds
    with pytest.raises(ResourceExhausted, match="needs room for 41 tokens"):
        batch.submit(make_generation(model, [5], 40))
    finished = []
    while batch.has_work:
        finished += [o.generation for o in batch.step() if isinstance(o.event, GenerationFinished)]
    assert finished == generations
    assert batch.reserved_tokens == 0


def test_a_failing_request_fails_alone(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    good, bad = make_generation(model, [5, 6, 7]), make_generation(model, [5, 10**6])
    said = Recorder([good, bad])
    for generation in (good, bad):
        model.batch.submit(generation)
    while model.batch.has_work:
        said.take(model.batch)
    assert set(said.errors) == {bad.request_id}
    assert said.tokens[good.request_id] == reference_tokens(tiny("llama"), [5, 6, 7], 12)


def test_numbers_that_are_not_finite_fail_their_row_and_leave_no_trace(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    long, bad = make_generation(model, make_prompts(2)[1], 30), make_generation(model, [5] * 16, 30)
    said = Recorder([long, bad])
    model.batch.submit(long)
    while not long.generated_tokens:
        said.take(model.batch)
    model.batch.submit(bad)
    said.take(model.batch)
    assert (bad.row, bad.generated_tokens) == (1, 1)
    model.batch._cache._pool[bad.row, :, :, :16] = float("nan")
    said.take(model.batch)
    assert said.errors[bad.request_id].reason == "MODEL_NOT_FINITE"
    # It gets the same row, and in it fewer tokens than those of the one before; what lies behind them is hidden, but is multiplied by 0.
    short = make_generation(model, [5, 6, 7], 6)
    said.watched.append(short)
    said.tokens[short.request_id] = []
    model.batch.submit(short)
    said.take(model.batch)
    assert short.row == 1
    while model.batch.has_work:
        said.take(model.batch)
    assert said.tokens[short.request_id] == reference_tokens(tiny("llama"), [5, 6, 7], 6)
    assert said.tokens[long.request_id] == reference_tokens(tiny("llama"), make_prompts(2)[1], 30)


def test_the_end_token_stops_and_usage_counts_it(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    tokens = reference_tokens(tiny("llama"), [5, 6, 7], 12)
    end = tokens[4]
    generation = make_generation(model, [5, 6, 7])
    generation.stop_ids = frozenset({end})
    model.batch.submit(generation)
    ends: list[GenerationFinished] = []
    while model.batch.has_work:
        ends += [o.event for o in model.batch.step() if isinstance(o.event, GenerationFinished)]
    assert ends[0].finish_reason is FinishReason.STOP
    assert (ends[0].usage.prompt_tokens, ends[0].usage.completion_tokens) == (3, tokens.index(end) + 1)
