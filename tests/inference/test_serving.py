"""Every technique's version through the engine against plain transformers and peft: alone, in mixed batches, and when it is bad."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from server.basemodels.inspection import fingerprint_directory
from server.basemodels.sources import BaseModelSource
from server.domain.errors import FailedPrecondition, InvalidInput, ResourceExhausted, ServiceError
from server.domain.generation import GenerationRequest, ModelReference
from server.inference.engine import EmbeddedEngine
from server.inference.plans import name_version
from server.storage.artefacts import Artefact, ArtefactStore, Described
from tests.inference.asking import Answer, ask, collect
from tests.inference.engines import make_engine
from tests.inference.versions import CONFIGS, VIRTUAL_TOKENS, continue_plainly, load_plain, load_reference, make_version
from tests.tiny_models import CONTEXT_TOKENS

PROMPT = "Who keeps the maps?"
TOKENS = 10
# peft says so of every AdaLoRA that it loads: it looks for the pattern's names among the layers before it has adapters in them.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
Tiny = Callable[[str], Path]
SHARED = ("lora", "rslora", "adalora", "vera", "prompt_tuning", "p_tuning", "prefix_tuning")
OWN = ("dora", "oft", "ia3", "layer_norm_tuning", "full")


@pytest.fixture
async def engine(tiny: Tiny, tmp_path: Path) -> AsyncIterator[EmbeddedEngine]:
    """An engine that knows every family by its name; versions lie in tmp_path."""
    made = make_engine({family: tiny(family) for family in ("llama", "falcon", "qwen2", "gemma")}, tmp_path)
    made.start()
    yield made
    await made.stop()


def ask_version(artefact: Artefact, family: str = "llama") -> GenerationRequest:
    return ask(PROMPT, model=family, adapter=artefact.path, max_tokens=TOKENS, logprobs=0)


async def assert_says_what_peft_says(engine: EmbeddedEngine, artefact: Artefact, base: Path, family: str = "llama") -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt_ids = tokenizer(PROMPT).input_ids
    expected, logprobs = continue_plainly(load_reference(artefact, base), prompt_ids, TOKENS)
    _, bare = continue_plainly(load_plain(base), prompt_ids, TOKENS)
    assert max(abs(ours - theirs) for ours, theirs in zip(logprobs, bare, strict=True)) > 0.005, "the version must do something"
    answer = await collect(engine.generate(ask_version(artefact, family)))
    positions = [position.chosen for delta in answer.deltas for position in delta.logprobs]
    count = len(positions)
    assert count == TOKENS or expected[count - 1] == tokenizer.eos_token_id
    assert [position.token for position in positions] == [tokenizer.decode([token]) for token in expected[:count]]
    torch.testing.assert_close([position.logprob for position in positions], logprobs[:count], atol=2e-4, rtol=2e-4)
    assert answer.end.usage.prompt_tokens == len(prompt_ids)


@pytest.mark.parametrize("technique", [*CONFIGS, "full"])
async def test_every_technique_says_what_transformers_and_peft_say(
    technique: str, engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path
) -> None:
    await assert_says_what_peft_says(engine, make_version(tmp_path, "version", tiny("llama"), technique), tiny("llama"))


@pytest.mark.parametrize(
    ("family", "technique"),
    [
        ("falcon", "prefix_tuning"), ("falcon", "prompt_tuning"), ("falcon", "oft"), ("falcon", "adalora"), ("falcon", "layer_norm_tuning"),
        ("gemma", "prompt_tuning"), ("gemma", "prefix_tuning"), ("gemma", "layer_norm_tuning"), ("gemma", "vera"),
        ("qwen2", "ia3"), ("qwen2", "dora"), ("qwen2", "prefix_tuning"),
    ],
)  # fmt: skip
async def test_other_families_too(family: str, technique: str, engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path) -> None:
    artefact = make_version(tmp_path, "version", tiny(family), technique, family=family)
    await assert_says_what_peft_says(engine, artefact, tiny(family), family)


@pytest.mark.parametrize(("technique", "quantization", "double"), [("lora", "NF4", True), ("lora", "FP4", False), ("dora", "NF4", False)])
async def test_a_version_trained_on_4_bits_is_served_on_what_4_bits_keep(
    technique: str, quantization: str, double: bool, engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path
) -> None:
    described: dict[str, Described] = {"quantization": quantization, "double_quantization": double}
    artefact = make_version(tmp_path, "version", tiny("llama"), technique, described=described)
    await assert_says_what_peft_says(engine, artefact, tiny("llama"))
    plain = make_version(tmp_path, "plain", tiny("llama"), technique)
    quantised, other = [await collect(engine.generate(ask_version(version))) for version in (artefact, plain)]
    assert list_logprobs(quantised) != list_logprobs(other)


@pytest.mark.parametrize("technique", ["lora", "vera", "dora", "oft", "prompt_tuning", "prefix_tuning"])
async def test_in_bfloat16_answers_are_those_of_float32_but_for_rounding(technique: str, tiny: Tiny, tmp_path: Path) -> None:
    artefact = make_version(tmp_path, "version", tiny("llama"), technique, scale=0.2)
    prompt_ids = AutoTokenizer.from_pretrained(tiny("llama"))(PROMPT).input_ids
    (expected,) = continue_plainly(load_reference(artefact, tiny("llama")), prompt_ids, 1)[1]
    engine = make_engine({"llama": tiny("llama")}, tmp_path, dtype=torch.bfloat16)
    engine.start()
    answer = await collect(engine.generate(ask_version(artefact)))
    assert list_logprobs(answer)[0] == pytest.approx(expected, abs=0.03)
    await engine.stop()


def list_logprobs(answer: Answer) -> list[float]:
    return [position.chosen.logprob for delta in answer.deltas for position in delta.logprobs]


async def test_techniques_that_leave_the_weights_share_them_in_one_batch(engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path) -> None:
    versions = [make_version(tmp_path, technique, tiny("llama"), technique) for technique in SHARED]
    requests = [*(ask_version(version) for version in versions), ask(PROMPT, max_tokens=TOKENS, logprobs=0)]
    alone = [await collect(engine.generate(request)) for request in requests]
    assert len({tuple(list_logprobs(answer)) for answer in alone}) == len(requests)
    together = await asyncio.gather(*(collect(engine.generate(request)) for request in requests * 3))
    assert [answer.text for answer in together] == [answer.text for answer in alone] * 3
    for answer, other in zip(together, alone * 3, strict=True):
        torch.testing.assert_close(list_logprobs(answer), list_logprobs(other), atol=1e-4, rtol=1e-4)
    status = await engine.describe()
    assert [(model.base_model, model.variant, model.adapters_loaded) for model in status.models] == [("llama", "", len(SHARED))]


@pytest.mark.parametrize("technique", ["lora", "prompt_tuning", "prefix_tuning", "dora"])
async def test_choices_of_an_answer_say_what_a_version_says_alone(
    technique: str, engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path
) -> None:
    asked = ask_version(make_version(tmp_path, "version", tiny("llama"), technique))
    alone = await collect(engine.generate(asked))
    choice = replace(asked, choice_of="an answer", echo_prompt=True)
    for answer in await asyncio.gather(*(collect(engine.generate(choice)) for _ in range(5))):
        assert (answer.text, answer.end.usage, answer.end.rendered_prompt) == (alone.text, alone.end.usage, PROMPT)
        torch.testing.assert_close(list_logprobs(answer), list_logprobs(alone), atol=1e-4, rtol=1e-4)
        assert 0 <= answer.end.timings.queue_seconds <= answer.end.timings.first_token_seconds <= answer.end.timings.total_seconds


async def test_versions_on_the_same_4_bits_share_one_model(engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path) -> None:
    described: dict[str, Described] = {"quantization": "NF4", "double_quantization": True}
    versions = [make_version(tmp_path, f"v{seed}", tiny("llama"), "lora", seed=seed, described=described) for seed in (1, 2)]
    versions.append(make_version(tmp_path, "single", tiny("llama"), "lora", described={"quantization": "NF4"}))
    answers = await asyncio.gather(*(collect(engine.generate(ask_version(version))) for version in versions))
    assert len({tuple(list_logprobs(answer)) for answer in answers}) == 3
    status = await engine.describe()
    assert sorted((model.variant, model.adapters_loaded) for model in status.models) == [("NF4", 1), ("NF4 double", 2)]


async def test_own_weights_count_against_the_budget_and_leave_by_last_use(tiny: Tiny, tmp_path: Path) -> None:
    versions = {technique: make_version(tmp_path, technique, tiny("llama"), technique) for technique in OWN}
    size = sum(parameter.nbytes for parameter in load_plain(tiny("llama")).parameters())
    engine = make_engine({"llama": tiny("llama")}, tmp_path, max_model_bytes=3 * size + size // 2)
    engine.start()
    texts = [(await collect(engine.generate(ask_version(version)))).text for version in versions.values()]
    status = await engine.describe()
    assert len(status.models) == 3
    assert all(model.variant.startswith("mdl_tiny ") and model.weight_bytes >= size // 2 for model in status.models)
    again = [(await collect(engine.generate(ask_version(version)))).text for version in versions.values()]
    assert again == texts
    await engine.stop()


async def test_adapters_count_against_the_budget_and_leave_by_last_use(tiny: Tiny, tmp_path: Path) -> None:
    versions = [make_version(tmp_path, f"v{seed}", tiny("llama"), "lora", seed=seed) for seed in range(4)]
    adapter_bytes = sum(4 * tensor.numel() for tensor in load_file(versions[0].directory / "adapter_model.safetensors").values())
    base_bytes = sum(parameter.nbytes for parameter in load_plain(tiny("llama")).parameters())
    engine = make_engine({"llama": tiny("llama")}, tmp_path, max_model_bytes=base_bytes + 2 * adapter_bytes + adapter_bytes // 2)
    engine.start()
    names = {name_version(ask_version(version).model): number for number, version in enumerate(versions)}

    async def list_held(*numbers: int) -> list[int]:
        """Ask versions, one after the other; then give those that are in memory, the last used one last."""
        for number in numbers:
            await collect(engine.generate(ask_version(versions[number])))
        (model,) = engine._residents._models.values()
        return [names[name] for name in model.adapters]

    assert await list_held(0, 1) == [0, 1]
    assert await list_held(2) == [1, 2]
    assert await list_held(1, 3) == [1, 3]
    async with aclosing(engine.generate(ask(PROMPT, adapter=versions[1].path, max_tokens=400))) as events:
        await anext(events)
        assert await list_held(2, 0) == [1, 0], "an adapter in use stays"
    await assert_says_what_peft_says(engine, versions[2], tiny("llama"))
    await engine.stop()


async def test_an_adapter_for_which_there_is_no_memory_is_refused_and_its_base_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    version = make_version(tmp_path, "v", tiny("llama"), "vera")
    base_bytes = sum(parameter.nbytes for parameter in load_plain(tiny("llama")).parameters())
    engine = make_engine(
        {"llama": tiny("llama")}, tmp_path, max_model_bytes=base_bytes + (version.directory / "adapter_model.safetensors").stat().st_size
    )
    engine.start()
    with pytest.raises(ResourceExhausted) as refused:
        await collect(engine.generate(ask_version(version)))
    assert refused.value.reason == "ENGINE_MEMORY_BUSY"
    assert (await collect(engine.generate(ask(PROMPT)))).text
    status = await engine.describe()
    assert (status.models[0].adapters_loaded, list(status.quarantined)) == (0, [])
    await engine.stop()


async def test_a_deleted_model_in_use_ends_its_answer_and_leaves(engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path) -> None:
    idle, busy = (make_version(tmp_path, name, tiny("llama"), "ia3", seed=seed) for seed, name in enumerate(("idle", "busy"), start=1))
    await collect(engine.generate(ask_version(idle)))
    request = ask(PROMPT, adapter=busy.path, max_tokens=300, seed=1, temperature=1.5)
    async with aclosing(engine.generate(request)) as events:
        await anext(events)
        await engine.forget("mdl_tiny")
        assert len((await engine.describe()).models) == 1
        async for event in events:
            last = event
    assert last.kind == "finished"
    await asyncio.sleep(0.05)
    assert not (await engine.describe()).models


async def test_virtual_tokens_take_their_part_of_the_context(engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path) -> None:
    for technique in ("prompt_tuning", "prefix_tuning"):
        artefact = make_version(tmp_path, technique, tiny("llama"), technique)
        reference = ModelReference("mdl_tiny", "llama", 1, artefact.path)
        assert await engine.read_context_tokens(reference) == CONTEXT_TOKENS - VIRTUAL_TOKENS
        answer = await collect(engine.generate(ask("maps " * 120, adapter=artefact.path, max_tokens=10**6)))
        used = answer.end.usage.prompt_tokens + answer.end.usage.completion_tokens
        assert used <= CONTEXT_TOKENS - VIRTUAL_TOKENS
        with pytest.raises(InvalidInput, match=str(CONTEXT_TOKENS - VIRTUAL_TOKENS)):
            await collect(engine.generate(ask("maps " * CONTEXT_TOKENS, adapter=artefact.path)))


def reseal(storage: Path, artefact: Artefact, path: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Artefact:
    """Seal a version's files anew with other tensors, as a faulty writer would."""

    def fill(directory: Path) -> Mapping[str, Described]:
        for name in artefact.files:
            (directory / name).write_bytes((artefact.directory / name).read_bytes())
        tensors = load_file(directory / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        return artefact.description

    return ArtefactStore(storage).write(path, fill)


def cut_first(tensors: dict[str, torch.Tensor]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name][..., :-1].contiguous()


def lose_first(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def spoil_first(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)].view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("technique", "damage"),
    [
        ("adalora", cut_first), ("vera", lose_first), ("vera", cut_first), ("prompt_tuning", cut_first), ("prompt_tuning", lose_first),
        ("prefix_tuning", cut_first), ("p_tuning", spoil_first), ("dora", lose_first), ("dora", spoil_first), ("oft", cut_first),
        ("ia3", lose_first),
    ],
)  # fmt: skip
async def test_a_bad_version_fails_its_own_requests_only(
    technique: str, damage: Callable[[dict[str, torch.Tensor]], None], engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path
) -> None:
    bad = reseal(tmp_path, make_version(tmp_path, "good", tiny("llama"), technique), "bad", damage)
    requests = [ask_version(bad), ask(PROMPT), ask_version(bad)]
    results = await asyncio.gather(*(collect(engine.generate(request)) for request in requests), return_exceptions=True)
    for result in (results[0], results[2]):
        assert isinstance(result, FailedPrecondition)
        assert result.reason == "ADAPTER_INVALID"
        assert str(tmp_path) not in str(result)
    assert isinstance(results[1], Answer)


async def test_a_version_with_a_flipped_byte_or_of_unknown_kind_is_refused(engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path) -> None:
    flipped = make_version(tmp_path, "flipped", tiny("llama"), "full")
    weights = flipped.directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    strange = make_version(tmp_path, "strange", tiny("llama"), "lora", described={"quantization": "INT3"})
    for artefact, reason in ((flipped, "ARTIFACT_INVALID"), (strange, "ADAPTER_INVALID")):
        with pytest.raises(ServiceError) as refused:
            await collect(engine.generate(ask_version(artefact)))
        assert refused.value.reason == reason


async def test_a_version_whose_tokenizer_reads_other_tokens_than_in_training_is_refused(
    engine: EmbeddedEngine, tiny: Tiny, tmp_path: Path
) -> None:
    for technique in ("lora", "ia3", "full"):
        other = make_version(tmp_path, technique, tiny("llama"), technique, described={"golden_token_ids": [1, 2, 3]})
        with pytest.raises(FailedPrecondition, match="other tokens") as refused:
            await collect(engine.generate(ask_version(other)))
        assert refused.value.reason == "TOKENS_CHANGED"


@pytest.fixture
async def changing(tiny: Tiny, tmp_path: Path) -> AsyncIterator[tuple[Path, EmbeddedEngine]]:
    """A local base model that may change, and an engine that finds it as the service does."""
    directory = tmp_path / "models" / "base"
    shutil.copytree(tiny("llama"), directory)
    source = BaseModelSource(tmp_path / "cache", allowed_local_roots=[tmp_path / "models"])
    made = make_engine({}, tmp_path, base_models=source)
    made.start()
    yield directory, made
    await made.stop()


def change_base(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    aside = directory / "model.safetensors.new"
    save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, aside, metadata={"format": "pt"})
    aside.replace(directory / "model.safetensors")


def read_revision(directory: Path) -> dict[str, Described]:
    return {"base_revision": f"fingerprint:{fingerprint_directory(directory)}"}


@pytest.mark.parametrize("technique", ["lora", "prefix_tuning", "oft"])
async def test_a_version_is_never_served_on_a_base_that_has_changed(
    technique: str, changing: tuple[Path, EmbeddedEngine], tmp_path: Path
) -> None:
    base, engine = changing
    name = str(base)
    before = make_version(tmp_path, "before", base, technique, described=read_revision(base))
    assert (await collect(engine.generate(ask_version(before, name)))).text
    other = make_version(tmp_path, "other", base, technique, seed=2, described=read_revision(base))
    change_base(base)
    after = make_version(tmp_path, "after", base, technique, described=read_revision(base))
    restarted = make_engine({}, tmp_path, base_models=BaseModelSource(tmp_path / "cache", allowed_local_roots=[tmp_path / "models"]))
    restarted.start()
    with pytest.raises(FailedPrecondition, match="changed since") as refused:
        await collect(restarted.generate(ask_version(before, name)))
    assert refused.value.reason == "BASE_MODEL_CHANGED"
    for serving in (restarted, engine):
        # What was trained on the new files goes with them; so does the base model by its name, once the old ones are gone from memory.
        await assert_says_what_peft_says(serving, after, base, name)
    await collect(restarted.generate(ask(PROMPT, model=name, max_tokens=2)))
    if technique == "oft":
        with pytest.raises(FailedPrecondition, match="changed since"):
            await collect(engine.generate(ask_version(other, name)))
    else:
        # The old weights are still in memory, and what belongs on them is put on them.
        assert (await collect(engine.generate(ask_version(other, name)))).text
    await restarted.stop()


async def test_a_whole_model_does_not_need_the_base_that_it_came_from(changing: tuple[Path, EmbeddedEngine], tmp_path: Path) -> None:
    base, engine = changing
    whole = make_version(tmp_path, "whole", base, "full", described=read_revision(base))
    expected, _ = continue_plainly(load_plain(whole.directory), AutoTokenizer.from_pretrained(base)(PROMPT).input_ids, TOKENS)
    change_base(base)
    answer = await collect(engine.generate(ask_version(whole, str(base))))
    assert [position.chosen.token for delta in answer.deltas for position in delta.logprobs][:1] == [
        AutoTokenizer.from_pretrained(base).decode(expected[:1])
    ]


async def test_a_base_model_that_changes_is_read_anew_once_nothing_holds_the_old_one(
    changing: tuple[Path, EmbeddedEngine], tmp_path: Path
) -> None:
    base, engine = changing
    request = ask(PROMPT, model=str(base), max_tokens=TOKENS, logprobs=0)
    first = await collect(engine.generate(request))
    change_base(base)
    assert list_logprobs(await collect(engine.generate(request))) == list_logprobs(first)
    await asyncio.sleep(0.05)  # the requests have ended
    await engine.forget(str(base))
    assert list_logprobs(await collect(engine.generate(request))) != list_logprobs(first)


async def test_a_low_rank_adapter_over_the_pool_is_merged(tiny: Tiny, tmp_path: Path) -> None:
    engine = make_engine({"llama": tiny("llama")}, tmp_path, max_adapter_ranks=8)
    engine.start()
    artefact = make_version(tmp_path, "version", tiny("llama"), "vera")
    await assert_says_what_peft_says(engine, artefact, tiny("llama"))
    assert (await engine.describe()).models[0].variant.startswith("mdl_tiny")
    await engine.stop()
