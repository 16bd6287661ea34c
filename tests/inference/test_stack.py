"""A model of fused layers without transformers' own forward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.inference.decoder import Decoder


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize(("family", "is_short"), [("llama", True), ("mistral", True), ("qwen2", True), ("gemma", False), ("falcon", False)])
def test_models_that_are_a_stack_of_fused_layers_go_the_short_way(tiny: Callable[[str], Path], family: str, is_short: bool) -> None:
    assert (Decoder(load(tiny(family)), max_adapter_ranks=8)._stack is not None) == is_short


def test_a_model_that_does_more_than_a_stack_keeps_its_own_way(tiny: Callable[[str], Path]) -> None:
    model = load(tiny("llama"))
    embed = model.model.embed_tokens

    def scale_twice(*arguments: Any, **named: Any) -> Any:
        embed.weight.data *= 2
        try:
            return forward(*arguments, **named)
        finally:
            embed.weight.data /= 2

    forward, model.model.forward = model.model.forward, scale_twice
    assert Decoder(model, max_adapter_ranks=8)._stack is None
