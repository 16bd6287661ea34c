"""Layers that run as kernels, in bfloat16, beside transformers' own on the same model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.inference.cache import RowCache, Step
from server.inference.decoder import Decoder
from server.inference.layers import FusedLayer

# Rows of different lengths, longer than the window below.
PROMPTS = [list(range(5, 5 + length)) for length in (3, 12, 20)]
NEXT_TOKENS = [[7, 9, 60], [8, 5, 30]]


def load(directory: Path, dtype: torch.dtype, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


def decode(decoder: Decoder) -> torch.Tensor:
    """Read the prompts one by one, then make two steps of all rows; give the logits [rows, vocabulary] after the last."""
    cache = RowCache(decoder.cache_shape, rows=len(PROMPTS))
    decoder.adapters.select([None])
    for row, prompt in enumerate(PROMPTS):
        step = Step(row, torch.arange(len(prompt)).unsqueeze(0), len(prompt), torch.bfloat16)
        decoder.forward(torch.tensor([prompt]), step, cache, wants_logits=False)
    decoder.adapters.select([None] * len(PROMPTS))
    for number, tokens in enumerate(NEXT_TOKENS):
        positions = torch.tensor([[len(prompt) + number] for prompt in PROMPTS])
        step = Step(0, positions, int(positions.max()) + 1, torch.bfloat16)
        logits = decoder.forward(torch.tensor(tokens).unsqueeze(1), step, cache, wants_logits=True)
    assert logits is not None
    return logits


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 8}), ("mistral", {"sliding_window": None})],
)
def test_kernels_are_used_and_say_what_transformers_says(tiny: Callable[[str], Path], family: str, options: dict[str, Any]) -> None:
    decoder = Decoder(load(tiny(family), torch.bfloat16, **options), max_adapter_ranks=8)
    layers = [module for module in decoder._model.modules() if isinstance(module, FusedLayer)]
    assert layers
    assert all(layer._kernels is not None for layer in layers)
    logits = decode(decoder)
    original = load(tiny(family), torch.float32, **options)
    for row, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            tokens = torch.tensor([[*prompt, *(tokens[row] for tokens in NEXT_TOKENS)]])
            expected = original(tokens).logits[0, -1]
        torch.testing.assert_close(logits[row].float(), expected, atol=0.02 * float(expected.abs().max()), rtol=0.05)
