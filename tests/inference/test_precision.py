"""bfloat16, as it is served: packed weights, merged layers and batched attention lose no more than transformers' own bfloat16 does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.inference.attention import ATTENTION_NAME, attend
from server.inference.cache import RowCache, Step
from server.inference.decoder import Decoder
from server.inference.precision import REFINED_TOKENS, LogitRefiner

ROWS, LENGTH = 6, 24


def compute_reference(directory: Path, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits[:, -1].float()
    return logits


@pytest.mark.parametrize("family", ["llama", "falcon", "gemma"])
def test_a_batch_in_bfloat16_is_as_near_to_float32_as_transformers_is(family: str, tiny: Callable[[str], Path]) -> None:
    ids = torch.randint(5, 250, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    exact = compute_reference(tiny(family), torch.float32, ids)
    theirs = (compute_reference(tiny(family), torch.bfloat16, ids) - exact).square().mean().sqrt()
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.bfloat16), max_adapter_ranks=8)
    cache = RowCache(decoder.cache_shape, ROWS)
    positions = torch.arange(LENGTH - 1).expand(ROWS, -1)
    decoder.forward(ids[:, :-1], Step(0, positions, LENGTH - 1, torch.bfloat16), cache, wants_logits=False)
    last = torch.full((ROWS, 1), LENGTH - 1)
    logits = decoder.forward(ids[:, -1:], Step(0, last, LENGTH, torch.bfloat16), cache, wants_logits=True)
    assert logits is not None
    ours = (logits.float() - exact).square().mean().sqrt()
    assert 0 < ours < 1.5 * theirs


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("new_tokens", [1, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_in_bfloat16_is_plain_attention_up_to_rounding(rows: int, new_tokens: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(rows, 2 * groups, new_tokens, 16, generator=generator)
    keys, values = (torch.randn(rows, 2, 40, 16, generator=generator) for _ in range(2))
    positions = torch.stack([torch.arange(new_tokens) + 3 + row for row in range(rows)])
    ours = attend(
        query.bfloat16(), keys.bfloat16()[:, :, :20], values.bfloat16()[:, :, :20], Step(0, positions, 20, torch.bfloat16), None, None
    )
    for row in range(rows):
        for token in range(new_tokens):
            seen = int(positions[row, token]) + 1
            for head in range(2 * groups):
                weights = torch.softmax(keys[row, head // groups, :seen] @ query[row, head, token] / 4.0, dim=0)
                expected = weights @ values[row, head // groups, :seen]
                torch.testing.assert_close(ours[row, token, head].float(), expected, atol=0.03, rtol=0.03)


def test_families_of_the_llama_shape_get_fused_layers_and_others_keep_their_own(tiny: Callable[[str], Path]) -> None:
    for family, expected in (("llama", 2), ("mistral", 2), ("qwen2", 2), ("gemma", 0), ("falcon", 0)):
        model: Any = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
        Decoder(model, max_adapter_ranks=8)
        fused = [name for name, module in model.named_modules() if type(module).__name__ == "FusedLayer"]
        assert len(fused) == expected, family
        assert (model.config._attn_implementation == ATTENTION_NAME) == (family != "falcon")


def test_the_likeliest_logits_are_exact_and_the_others_stay() -> None:
    weight = torch.randn(500, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    head = torch.nn.Linear(32, 500, bias=False, dtype=torch.bfloat16)
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    refiner = LogitRefiner(head, weight)
    hidden = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    coarse = head(hidden)[:, -1]
    refined = refiner.refine(coarse)
    exact = hidden[:, -1].float() @ weight.float().T
    likeliest = coarse.topk(REFINED_TOKENS).indices
    assert (refined - exact).gather(1, likeliest).abs().max() < 1e-4
    assert (coarse.float() - exact).gather(1, likeliest).abs().max() > 1e-3
    others = torch.ones_like(refined).scatter(1, likeliest, 0).bool()
    assert torch.equal(refined[others], coarse.float()[others])


def test_a_head_that_scales_its_logits_is_left_alone() -> None:
    weight = torch.randn(500, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    head = torch.nn.Linear(32, 500, bias=False, dtype=torch.bfloat16)
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    refiner = LogitRefiner(head, weight)
    capped = torch.tanh(head(torch.randn(2, 1, 32).bfloat16())[:, -1])
    assert torch.equal(refiner.refine(capped), capped.float())
