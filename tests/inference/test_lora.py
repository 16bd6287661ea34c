"""Adapters in a batch against peft's own forward pass, and every way in which a directory can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from server.domain.errors import FailedPrecondition, ResourceExhausted, ServiceError, Unimplemented
from server.inference.adapterfiles import read_low_rank
from server.inference.batching import Batch
from server.inference.cache import RowCache, Step
from server.inference.decoder import Decoder
from server.inference.library import LoadedModel
from server.inference.lora import AdapterPool, NamedAdapter
from server.inference.selection import AdapterSelection
from tests.inference.batches import load, make_generation, run
from tests.inference.conftest import LINEARS, save_adapter

PROMPT = [5, 60, 70, 200, 33, 8, 14]


def peft_logits(base: Path, adapter: Path | None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([PROMPT])).logits[0, -1]
    return logits


def batched_logits(decoder: Decoder, names: list[str | None]) -> torch.Tensor:
    """Read the prompt into one row per adapter, all but the last token alone, the last one in one batch."""
    cache = RowCache(decoder.cache_shape, rows=len(names))
    length = len(PROMPT)
    for row, name in enumerate(names):
        decoder.adapters.select([name])
        step = Step(row, torch.arange(length - 1).unsqueeze(0), length - 1, torch.float32)
        decoder.forward(torch.tensor([PROMPT[:-1]]), step, cache, wants_logits=False)
    decoder.adapters.select(names)
    step = Step(0, torch.full((len(names), 1), length - 1), length, torch.float32)
    logits = decoder.forward(torch.full((len(names), 1), PROMPT[-1]), step, cache, wants_logits=True)
    assert logits is not None
    return logits


def put(model: LoadedModel, name: str, directory: Path) -> NamedAdapter:
    adapter = read_low_rank(directory, model.decoder.adapters.places)
    assert model.decoder.adapters.acquire(name, adapter)
    return NamedAdapter(name, adapter)


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon", "qwen2", "gemma"])
def test_adapters_of_different_ranks_and_the_base_in_one_batch_compute_what_peft_computes(
    family: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    base, modules = tiny(family), LINEARS.get(family, LINEARS["default"])
    first = save_adapter(base, tmp_path / "first", rank=4, seed=1, modules=modules)
    second = save_adapter(base, tmp_path / "second", rank=8, seed=2, modules=modules[:1], use_rslora=True)
    patterns = {"rank_pattern": {modules[0]: 6}, "alpha_pattern": {modules[1]: 9}}
    third = save_adapter(base, tmp_path / "third", rank=2, seed=3, modules=modules, **patterns)
    model = load(base)
    directories = {"first": first, "second": second, "third": third}
    for name, directory in directories.items():
        put(model, name, directory)
    logits = batched_logits(model.decoder, ["first", None, "second", "third", "first"])
    expected: dict[str | None, torch.Tensor] = {name: peft_logits(base, directory) for name, directory in directories.items()}
    expected[None] = peft_logits(base, None)
    order: list[str | None] = ["first", None, "second", "third", "first"]
    for row, key in enumerate(order):
        torch.testing.assert_close(logits[row], expected[key], atol=1e-4, rtol=1e-4)
    for name in directories:
        assert (expected[name] - expected[None]).abs().max() > 0.01, "the adapter must do something, or this shows nothing"


def test_generations_with_different_adapters_share_a_batch_and_say_what_they_say_alone(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny("llama")
    directories = {f"a{n}": save_adapter(base, tmp_path / f"a{n}", rank=2 * n, seed=n) for n in (1, 2, 3)}
    alone: dict[str | None, list[int]] = {}
    names: list[str | None] = [*directories, None]
    for name in names:
        model = load(base)
        generation = make_generation(model, PROMPT)
        generation.adapter = None if name is None else NamedAdapter(name, read_low_rank(directories[name], model.decoder.adapters.places))
        alone[name] = run(model.batch, generation)[generation.request_id]
    model = load(base)
    together = {}
    for name in alone:
        together[name] = make_generation(model, PROMPT)
        if name is not None:
            together[name].adapter = NamedAdapter(name, read_low_rank(directories[name], model.decoder.adapters.places))
    said = run(model.batch, *together.values())
    assert {name: said[generation.request_id] for name, generation in together.items()} == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == 4


def test_an_overflow_in_one_adapter_stays_in_its_rows(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny("llama")
    model = load(base)
    put(model, "good", save_adapter(base, tmp_path / "good", rank=4, seed=1))
    put(model, "huge", save_adapter(base, tmp_path / "huge", rank=4, seed=2, modules=["down_proj"]))
    for projection, _ in model.decoder.adapters.places.values():
        if projection.pool is not None:
            projection.pool.down[4:8] = float("inf")
    logits = batched_logits(model.decoder, ["good", "huge"])
    torch.testing.assert_close(logits[0], peft_logits(base, tmp_path / "good"), atol=2e-4, rtol=2e-4)
    assert not torch.isfinite(logits[1]).all()


def make_pool(model: LoadedModel, max_ranks: int) -> AdapterPool:
    decoder = model.decoder
    return AdapterPool(decoder.adapters.places, AdapterSelection(), dtype=torch.float32, device=torch.device("cpu"), max_ranks=max_ranks)


def test_the_pool_drops_who_was_idle_longest_and_keeps_who_is_used(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(tiny("llama"))
    pool = make_pool(model, max_ranks=8)
    adapters = {n: read_low_rank(save_adapter(tiny("llama"), tmp_path / n, rank=4, seed=ord(n)), pool.places) for n in "abc"}
    assert pool.acquire("a", adapters["a"])
    assert pool.acquire("b", adapters["b"])
    assert not pool.acquire("c", adapters["c"])
    pool.release("b")
    assert pool.acquire("c", adapters["c"])
    assert set(pool.names) == {"a", "c"}
    big = read_low_rank(save_adapter(tiny("llama"), tmp_path / "big", rank=9, seed=9), pool.places)
    with pytest.raises(ResourceExhausted, match="rank 9 is over"):
        pool.acquire("big", big)


def test_a_request_waits_until_its_adapter_fits(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(tiny("llama"))
    model.decoder.adapters._max_ranks = 4
    batch: Batch = model.batch
    generations = []
    for number in (1, 2):
        directory = save_adapter(tiny("llama"), tmp_path / str(number), rank=3, seed=number)
        generation = make_generation(model, PROMPT, 4)
        generation.adapter = NamedAdapter(str(number), read_low_rank(directory, model.decoder.adapters.places))
        generations.append(generation)
        batch.submit(generation)
    batch.step()
    assert (batch.running_count, batch.waiting_count) == (1, 1)
    while batch.has_work:
        batch.step()
    assert [g.generated_tokens for g in generations] == [4, 4]


def rewrite_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"use_dora": True}, Unimplemented),
        ({"bias": "all"}, Unimplemented),
        ({"modules_to_save": ["lm_head"]}, Unimplemented),
        ({"init_lora_weights": "pissa"}, Unimplemented),
        ({"peft_type": "PROMPT_TUNING"}, Unimplemented),
        ({"lora_alpha": "much"}, FailedPrecondition),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused(
    changes: dict[str, object], error: type[ServiceError], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = save_adapter(tiny("llama"), tmp_path, rank=4, seed=1)
    rewrite_config(directory, **changes)
    with pytest.raises(error):
        read_low_rank(directory, load(tiny("llama")).decoder.adapters.places)


@pytest.mark.parametrize("damage", ["stranger", "half", "shape", "infinite", "truncated", "missing", "empty", "no_config"])
def test_an_adapter_with_a_tensor_out_of_place_is_refused(damage: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory = save_adapter(tiny("llama"), tmp_path, rank=4, seed=1)
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if "q_proj.lora_A" in name)
    if damage == "stranger":
        tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()
    elif damage == "half":
        del tensors[key]
    elif damage == "shape":
        tensors[key] = tensors[key][:, :-1].contiguous()
    elif damage == "infinite":
        tensors[key][0, 0] = float("inf")
    elif damage == "empty":
        tensors = {}
    save_file(tensors, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "missing":
        path.unlink()
    elif damage == "no_config":
        (directory / "adapter_config.json").write_text("{")
    with pytest.raises(FailedPrecondition) as refused:
        read_low_rank(directory, load(tiny("llama")).decoder.adapters.places)
    assert refused.value.reason == "ADAPTER_INVALID"
    assert str(tmp_path) not in str(refused.value)
