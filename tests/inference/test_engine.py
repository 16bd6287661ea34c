"""The embedded engine as its callers see it: streams, seeds, stops, cancelling, loading and unloading."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, ResourceExhausted, Unavailable
from server.domain.generation import EmbedRole, FinishReason, GenerationFinished, ModelReference, Priority
from server.inference import quarantine
from server.inference.batching import BatchLimits
from server.inference.engine import EmbeddedEngine
from server.inference.library import LoadingOptions, WeightFiles
from server.storage.artefacts import ArtefactStore, Described
from tests.inference.asking import ask, ask_chat, collect
from tests.inference.conftest import save_adapter
from tests.inference.engines import make_engine
from tests.inference.versions import make_version
from tests.tiny_models import CONTEXT_TOKENS

LLAMA = ModelReference("llama", "llama")


async def test_an_answer_is_the_same_alone_and_among_others(engine: EmbeddedEngine) -> None:
    prompts = [f"The river town keeps {n} maps" + " in a blue house" * n for n in range(8)]
    alone = [await collect(engine.generate(ask(prompt))) for prompt in prompts]
    together = await asyncio.gather(*(collect(engine.generate(ask(prompt))) for prompt in prompts))
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in alone}) > 1


async def test_usage_is_exact_and_timings_are_in_order(engine: EmbeddedEngine) -> None:
    prompt = "Who keeps the maps?"
    answer = await collect(engine.generate(ask(prompt, max_tokens=7)))
    assert answer.end.finish_reason is FinishReason.LENGTH
    assert answer.end.usage.completion_tokens == 7
    assert [answer.end.usage.prompt_tokens] == list(await engine.count_tokens(LLAMA, [prompt]))
    assert 0 <= answer.end.timings.queue_seconds <= answer.end.timings.first_token_seconds <= answer.end.timings.total_seconds


async def test_messages_go_through_the_chat_template(engine: EmbeddedEngine) -> None:
    chat = await collect(engine.generate(ask_chat("Hello")))
    plain = await collect(engine.generate(ask("Hello")))
    assert chat.end.usage.prompt_tokens > plain.end.usage.prompt_tokens + 4


async def test_a_seed_repeats_a_text_in_any_company_and_the_answer_names_the_seed(engine: EmbeddedEngine) -> None:
    sampled = ask("The river", temperature=1.5, top_p=0.95, seed=11, max_tokens=24)
    alone = await collect(engine.generate(sampled))
    company = [engine.generate(ask("A question", temperature=1.0, max_tokens=30)) for _ in range(3)]
    among, *others = await asyncio.gather(collect(engine.generate(sampled)), *map(collect, company))
    assert among.text == alone.text
    assert among.end.seed == 11
    drawn = others[0].end.seed
    again = await collect(engine.generate(ask("A question", temperature=1.0, max_tokens=30, seed=drawn)))
    assert again.text == others[0].text
    assert len({other.text for other in others}) > 1


async def test_a_stop_string_ends_the_answer_before_it(engine: EmbeddedEngine) -> None:
    whole = (await collect(engine.generate(ask("Who keeps the maps?", max_tokens=24)))).text
    stop = whole[4:9]
    cut = whole[: whole.index(stop)]
    answer = await collect(engine.generate(ask("Who keeps the maps?", max_tokens=24, stop=(stop,))))
    assert (answer.text, answer.end.finish_reason) == (cut, FinishReason.STOP_STRING)
    assert answer.end.usage.completion_tokens < 24


async def test_logprobs_come_for_each_token(engine: EmbeddedEngine) -> None:
    answer = await collect(engine.generate(ask("Who keeps", max_tokens=9, logprobs=2)))
    positions = [position for delta in answer.deltas for position in delta.logprobs]
    assert len(positions) == answer.end.usage.completion_tokens
    for position in positions:
        assert position.chosen.logprob <= 0
        assert position.chosen == position.top[0], "greedy takes the likeliest"


async def test_bias_forbids_and_forces_tokens_and_stop_tokens_end_an_answer(engine: EmbeddedEngine, tiny: Callable[[str], Path]) -> None:
    free = await collect(engine.generate(ask("Who keeps", max_tokens=9, logprobs=5)))
    steps = [position for delta in free.deltas for position in delta.logprobs]
    vocabulary = AutoTokenizer.from_pretrained(tiny("llama")).get_vocab()
    ids = {name: token_id for name, token_id in vocabulary.items() if name in "abcdefgh"}
    forced = await collect(engine.generate(ask("Who keeps", max_tokens=5, logit_bias={ids["c"]: 100.0})))
    assert forced.text == "ccccc"
    ended = await collect(engine.generate(ask("Who keeps", max_tokens=5, logit_bias={ids["c"]: 100.0}, stop_token_ids=(ids["c"],))))
    assert (ended.text, ended.end.finish_reason, ended.end.usage.completion_tokens) == ("", FinishReason.STOP_TOKEN, 1)
    best = steps[0].top[0].token
    (best_id,) = [token_id for name, token_id in vocabulary.items() if name.replace("Ġ", " ") == best]
    banned = await collect(engine.generate(ask("Who keeps", max_tokens=1, logit_bias={best_id: -100.0}, logprobs=5)))
    (position,) = [position for delta in banned.deltas for position in delta.logprobs]
    assert position.chosen.token == steps[0].top[1].token
    for parameters in ({"stop_token_ids": (10**6,)}, {"logit_bias": {10**6: 1.0}}):
        with pytest.raises(InvalidInput) as refused:
            await collect(engine.generate(ask("Who keeps", **parameters)))
        assert refused.value.reason == "TOKEN_UNKNOWN"


async def test_a_high_priority_overtakes_and_a_low_one_waits(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    engine = make_engine({"llama": tiny("llama")}, tmp_path, BatchLimits(max_rows=1, max_waiting=16, cache_tokens=600))
    engine.start()
    first = engine.generate(ask("The river", max_tokens=480))
    await anext(first)
    ended: list[str] = []

    async def run(name: str, priority: Priority) -> None:
        await collect(engine.generate(replace(ask("A question", max_tokens=2), priority=priority)))
        ended.append(name)

    tasks: list[asyncio.Task[None]] = []
    for name, priority in (("low", Priority.LOW), ("normal", Priority.NORMAL), ("high", Priority.HIGH)):
        tasks.append(asyncio.create_task(run(name, priority)))
        while (await engine.describe()).models[0].waiting_requests < len(tasks):  # noqa: ASYNC110  # polled, as a caller would
            await asyncio.sleep(0.001)
    await first.aclose()
    await asyncio.gather(*tasks)
    assert ended == ["high", "normal", "low"]
    await engine.stop()


async def test_the_answer_tells_how_long_loading_took(engine: EmbeddedEngine, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    make_version(tmp_path, "one", tiny("llama"), "lora")
    cold, warm = [(await collect(engine.generate(ask("The river", adapter="one")))).end.timings for _ in range(2)]
    assert min(cold.load_seconds, cold.adapter_load_seconds) > 5 * max(warm.load_seconds, warm.adapter_load_seconds)
    assert cold.load_seconds + cold.adapter_load_seconds + cold.queue_seconds <= cold.first_token_seconds


async def test_beside_the_thread_that_generates_no_other_stays_that_computed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Each would keep a team of OpenMP's threads, beside which those of the generating one sleep between any two operations."""
    engine = make_engine({"llama": tiny("llama")}, tmp_path)
    make_version(tmp_path, "one", tiny("llama"), "lora")
    engine.start()
    await collect(engine.generate(ask("The river", adapter="one")))

    # The governor computes nothing, and its idle team is there on purpose while others compute (test_spinning.py).
    governing = {"engine-spins", "engine-idle-team"}

    def name_computing() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("engine-")} - governing

    end = time.monotonic() + 10
    while name_computing() != {"engine-steps"}:
        assert time.monotonic() < end, name_computing()
        await asyncio.sleep(0.01)
    await engine.stop()


async def test_a_prompt_over_the_context_is_refused_with_both_figures(engine: EmbeddedEngine) -> None:
    prompt = "maps " * CONTEXT_TOKENS
    tokens = (await engine.count_tokens(LLAMA, [prompt]))[0]
    with pytest.raises(InvalidInput) as refused:
        await collect(engine.generate(ask(prompt)))
    assert refused.value.reason == "PROMPT_TOO_LONG"
    assert str(tokens) in str(refused.value)
    assert str(CONTEXT_TOKENS) in str(refused.value)
    assert refused.value.data.violations[0].field == "prompt"
    with pytest.raises(InvalidInput, match="is empty"):
        await collect(engine.generate(ask("")))


async def test_an_answer_is_bounded_by_the_context(engine: EmbeddedEngine) -> None:
    answer = await collect(engine.generate(ask("maps " * 100, max_tokens=10**9)))
    usage = answer.end.usage
    assert usage.prompt_tokens + usage.completion_tokens <= CONTEXT_TOKENS
    assert answer.end.finish_reason is FinishReason.STOP or usage.prompt_tokens + usage.completion_tokens == CONTEXT_TOKENS
    assert await engine.read_context_tokens(LLAMA) == CONTEXT_TOKENS


async def test_closing_a_stream_frees_its_place_within_a_step(engine: EmbeddedEngine) -> None:
    async with aclosing(engine.generate(ask("The river", max_tokens=400))) as events:
        await anext(events)
        assert (await engine.describe()).models[0].running_requests == 1
    steps = engine._stepper
    await steps.call(lambda: None)  # commands are taken between steps, in order
    status = (await engine.describe()).models[0]
    assert (status.running_requests, status.reserved_cache_tokens) == (0, 0)


async def test_cancelling_a_task_in_the_queue_leaves_nothing_behind(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    engine = make_engine({"llama": tiny("llama")}, tmp_path, BatchLimits(max_rows=1, max_waiting=4, cache_tokens=600))
    engine.start()
    first = asyncio.create_task(collect(engine.generate(ask("The river", max_tokens=300))))
    await asyncio.sleep(0.1)
    waiting = [asyncio.create_task(collect(engine.generate(ask("A question")))) for _ in range(3)]
    await asyncio.sleep(0.1)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await engine._stepper.call(lambda: None)
    status = (await engine.describe()).models[0]
    assert status.waiting_requests == 0
    assert (await first).end.usage.completion_tokens > 0
    await engine.stop()


async def test_more_than_the_queue_holds_is_refused_and_the_rest_is_served(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    engine = make_engine({"llama": tiny("llama")}, tmp_path, BatchLimits(max_rows=2, max_waiting=3, cache_tokens=600))
    engine.start()
    await engine.read_context_tokens(LLAMA)
    results = await asyncio.gather(*(collect(engine.generate(ask("The river", max_tokens=40))) for _ in range(30)), return_exceptions=True)
    refused = [r for r in results if isinstance(r, ResourceExhausted)]
    served = [r for r in results if not isinstance(r, BaseException)]
    assert len(refused) + len(served) == 30
    assert len(served) >= 5
    assert refused
    assert refused[0].data.retry_after_seconds
    await engine.stop()


async def test_adapters_share_a_base_and_a_bad_one_fails_only_its_own_requests(
    engine: EmbeddedEngine, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("one", "two", "bad"):

        def fill(directory: Path, name: str = name) -> dict[str, Described]:
            save_adapter(tiny("llama"), directory, rank=4, seed=len(name) + ord(name[0]))
            if name == "bad":
                (directory / "adapter_model.safetensors").write_bytes(b"no tensors")
            return {"kind": "adapter"}

        ArtefactStore(tmp_path).write(name, fill)
    requests = [ask("The river", adapter=name) for name in ("one", "two", "bad", None)]
    results = await asyncio.gather(*(collect(engine.generate(request)) for request in requests), return_exceptions=True)
    assert isinstance(results[2], FailedPrecondition)
    texts = [r.text for r in results if not isinstance(r, BaseException)]
    assert len(set(texts)) == 3
    status = await engine.describe()
    assert (len(status.models), status.models[0].adapters_loaded) == (1, 2)
    await engine.forget("mdl_tiny")
    assert (await engine.describe()).models[0].adapters_loaded == 0
    again = await collect(engine.generate(requests[0]))
    assert again.text == texts[0]


def weigh(directory: Path) -> int:
    """Bytes of a tiny model's weights as the tests load them."""
    return WeightFiles(directory).measure_bytes(LoadingOptions(BatchLimits(), dtype=torch.float32))


async def test_models_over_the_budget_leave_by_last_use_and_come_back(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    table = {family: tiny(family) for family in ("llama", "qwen2", "mistral")}
    engine = make_engine(table, tmp_path, max_model_bytes=sum(sorted(map(weigh, table.values()))[-2:]))
    engine.start()
    first = await collect(engine.generate(ask("The river", model="llama")))
    await collect(engine.generate(ask("The river", model="qwen2")))
    assert {model.base_model for model in (await engine.describe()).models} == {"llama", "qwen2"}
    async with aclosing(engine.generate(ask("The river", model="llama", max_tokens=400))) as events:
        await anext(events)
        await collect(engine.generate(ask("The river", model="mistral")))
        loaded = {model.base_model for model in (await engine.describe()).models}
        assert loaded == {"llama", "mistral"}, "a model in use stays"
    again = await collect(engine.generate(ask("The river", model="qwen2")))
    assert again.text
    assert (await collect(engine.generate(ask("The river", model="llama")))).text == first.text
    await engine.stop()


async def test_a_model_for_which_there_is_no_memory_is_refused_and_the_others_go_on(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    table = {family: tiny(family) for family in ("llama", "mistral")}
    small = make_engine(table, tmp_path, max_model_bytes=weigh(table["llama"]))
    small.start()
    with pytest.raises(ResourceExhausted) as never:
        await collect(small.generate(ask("The river", model="mistral")))
    assert (never.value.reason, never.value.data.retry_after_seconds) == ("MODEL_TOO_LARGE", None)
    await small.stop()
    engine = make_engine(table, tmp_path, max_model_bytes=max(map(weigh, table.values())))
    engine.start()
    running = engine.generate(ask("The river", max_tokens=400))
    await anext(running)
    with pytest.raises(ResourceExhausted) as busy:
        await collect(engine.generate(ask("The river", model="mistral")))
    assert busy.value.reason == "ENGINE_MEMORY_BUSY"
    assert busy.value.data.retry_after_seconds
    assert (await collect(running)).end.usage.completion_tokens == 400
    await engine.stop()


async def test_idle_models_are_unloaded_but_for_pinned_ones(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    engine = make_engine({family: tiny(family) for family in ("llama", "qwen2")}, tmp_path, idle_seconds=0.2)
    engine.start()
    await engine.load(LLAMA, pinned=True)
    await engine.load(ModelReference("qwen2", "qwen2"))
    async with aclosing(engine.generate(ask("The river", model="qwen2", max_tokens=490))) as events:
        await anext(events)
        await asyncio.sleep(0.4)
        assert len((await engine.describe()).models) == 2, "a model in use is not idle"
    while len((await engine.describe()).models) > 1:  # noqa: ASYNC110  # the engine's status is polled, as a caller would
        await asyncio.sleep(0.02)
    assert [(model.base_model, model.is_pinned) for model in (await engine.describe()).models] == [("llama", True)]
    await engine.unload(LLAMA)
    assert not (await engine.describe()).models
    await engine.stop()


async def test_a_version_deleted_under_the_engine_ends_what_runs_and_is_refused_once_it_must_be_read_again(
    engine: EmbeddedEngine, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    gone, other = (make_version(tmp_path, name, tiny("llama"), "lora", seed=seed) for seed, name in enumerate(("gone", "other")))
    running = engine.generate(ask("The river", adapter="gone", max_tokens=60, logit_bias={1: -100.0}))
    await anext(running)
    shutil.rmtree(gone.directory)
    assert (await collect(running)).end.usage.completion_tokens == 60
    assert (await collect(engine.generate(ask("The river", adapter="gone")))).text, "what is in memory serves on"
    await engine.unload(ask("", adapter="gone").model)
    results = await asyncio.gather(
        *(collect(engine.generate(ask("The river", adapter=name))) for name in ("gone", other.path)), return_exceptions=True
    )
    assert isinstance(results[0], FailedPrecondition)
    assert results[0].reason == "ARTIFACT_INVALID"
    assert not isinstance(results[1], BaseException)


async def test_a_version_whose_files_fail_is_quarantined_until_it_is_looked_at_again(
    engine: EmbeddedEngine, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        version = make_version(tmp_path, name, tiny("llama"), "lora")
    good = (version.directory / "adapter_model.safetensors").read_bytes()
    (version.directory / "adapter_model.safetensors").write_bytes(good[:-1] + b"x")
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as refused:
            await collect(engine.generate(ask("The river", adapter="two")))
        assert refused.value.reason == "ARTIFACT_INVALID"
        (version.directory / "adapter_model.safetensors").write_bytes(good)
    assert (await engine.describe()).quarantined == ["mdl_tiny"]
    assert (await collect(engine.generate(ask("The river", adapter="one")))).text
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + quarantine.QUARANTINE_SECONDS)
    assert (await collect(engine.generate(ask("The river", adapter="two")))).text
    assert not (await engine.describe()).quarantined


async def test_many_who_want_a_model_load_it_once_and_an_unknown_one_is_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    engine = make_engine({"llama": tiny("llama")}, tmp_path)
    engine.start()
    impatient = asyncio.create_task(collect(engine.generate(ask("The river"))))
    await asyncio.sleep(0)
    patient = [asyncio.create_task(collect(engine.generate(ask("The river")))) for _ in range(4)]
    await asyncio.sleep(0.001)
    impatient.cancel()
    answers = await asyncio.gather(*patient)
    assert len({answer.text for answer in answers}) == 1
    assert len((await engine.describe()).models) == 1
    with pytest.raises(NotFound, match="nowhere"):
        await collect(engine.generate(ask("The river", model="nowhere")))
    await engine.stop()


async def test_stopping_fails_running_requests_as_unavailable(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    engine = make_engine({"llama": tiny("llama")}, tmp_path)
    engine.start()
    events = engine.generate(ask("The river", max_tokens=450))
    await anext(events)
    await engine.stop()
    with pytest.raises(Unavailable):
        await collect(events)


async def test_an_engine_without_an_embedder_says_so(engine: EmbeddedEngine) -> None:
    with pytest.raises(FailedPrecondition):
        await engine.embed("minilm", ["text"], EmbedRole.QUERY)


async def test_unread_deltas_become_one_so_that_a_reader_who_sleeps_costs_one_text(engine: EmbeddedEngine) -> None:
    async with aclosing(engine.generate(ask("The river", max_tokens=200))) as events:
        await anext(events)
        for _ in range(300):
            await asyncio.sleep(0.02)
            if (await engine.describe()).models[0].running_requests == 0:
                break
        rest = [event async for event in events]
    assert len(rest) <= 2
    assert isinstance(rest[-1], GenerationFinished)
