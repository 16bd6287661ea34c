"""A gated MLP that is trained keeps less for the backward pass and computes the same, bit for bit."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from server.training.fused import fuse


def make_mlp(dtype: torch.dtype, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=4, **changes)).to(dtype)  # type: ignore[arg-type, no-untyped-call]  # its fields


def compute(module: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Give output and gradients, and the bytes that were kept in between."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = module(x)
    out.float().square().sum().backward()
    return [out, *(tensor.grad for tensor in (x, *module.parameters()) if tensor.grad is not None)], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_the_same_and_keeps_less(dtype: torch.dtype, bias: bool) -> None:
    plain = make_mlp(dtype, mlp_bias=bias)
    fused = deepcopy(plain)
    assert fuse(fused) == 1
    x = torch.randn(1, 30, 16).to(dtype)
    (expected, most), (got, least) = compute(plain, x), compute(fused, x)
    assert len(got) == len(expected) == 5 + 3 * bias
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    assert most - least == 2 * 30 * 40 * dtype.itemsize


def test_another_activation_or_a_frozen_layer_is_left_as_it_is() -> None:
    frozen = make_mlp(torch.float32)
    frozen.get_parameter("up_proj.weight").requires_grad_(False)
    assert fuse(frozen) == 0
    assert fuse(make_mlp(torch.float32, hidden_act="gelu")) == 0
