"""Holds a model's linear layers in 4 bits (Dettmers et al. 2023), or gives them the values that 4 bits keep of them.

Kernels and format are bitsandbytes'. The layer's forward pass is not: on a CPU bitsandbytes repacks the weights of a layer that evaluates
and rounds their scales, so that evaluating once would change what is trained.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from torch.autograd import Function
from torch.nn.functional import linear
from transformers import PreTrainedModel

from server.domain.techniques import Quantization

# Weights that share one scale; bitsandbytes' own and the paper's.
BLOCK_SIZE = 64


class QuantizedLinear(Linear4bit):
    """A frozen linear layer in 4 bits. De-quantised for each pass; nothing of the weight's size is kept for the backward pass."""

    compute_dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.Linear, quantization: Quantization, double_quantization: bool, compute_dtype: torch.dtype) -> "QuantizedLinear":
        """Quantise a layer. The original is left as it was."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, bias=False, compute_dtype=compute_dtype)
        data, state = _quantize(layer.weight.detach(), quantization, double_quantization)
        state.dtype = compute_dtype  # the type that comes out
        made.quant_state = state
        made.weight = Params4bit(
            data, requires_grad=False, quant_state=state, blocksize=BLOCK_SIZE, compress_statistics=double_quantization,
            quant_type=quantization.value.lower(), module=made, bnb_quantized=True,
        )  # fmt: skip
        made.bias = layer.bias
        return made

    def dequantize(self) -> torch.Tensor:
        """Give the weight [O, I] in the compute type."""
        return dequantize_4bit(self.weight, self.quant_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [..., I] to [..., O]."""
        return cast(torch.Tensor, _QuantizedLinearFunction.apply(x, self))  # type: ignore[no-untyped-call]  # torch leaves it untyped


Note = Callable[[str, nn.Linear, QuantizedLinear], None]


class _QuantizedLinearFunction(Function):
    """y = x W' + b with W in 4 bits; de-quantises again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(layer.compute_dtype)
        return linear(x.to(layer.compute_dtype), layer.dequantize(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = upstream[0]
        return (gradient.to(ctx.layer.compute_dtype) @ ctx.layer.dequantize()).to(gradient.dtype), None


def quantize(
    model: PreTrainedModel,
    quantization: Quantization,
    double_quantization: bool,
    compute_dtype: torch.dtype | None = None,
    note: Note | None = None,
) -> None:
    """Replace the linear layers, all but the output head, by frozen ones in 4 bits.

    `compute_dtype` None: the model's own. `note` is told each layer's name, the layer and what replaces it.
    Raises ValueError when the model has no such layer.
    """
    for parent, name, layer in list(_select_layers(model)):
        attribute = name.rpartition(".")[2]
        made = QuantizedLinear.of(layer, quantization, double_quantization, compute_dtype or model.dtype)
        if note is not None:
            note(name, layer, made)
        setattr(parent, attribute, made)


def dequantize_in_place(model: PreTrainedModel, quantization: Quantization, double_quantization: bool) -> None:
    """Give the same layers the values that `quantize` would keep: plain layers that compute what the 4-bit ones do.

    Raises ValueError when the model has no such layer.
    """
    with torch.no_grad():
        for _, _, layer in _select_layers(model):
            layer.weight.copy_(dequantize_4bit(*_quantize(layer.weight, quantization, double_quantization)))


def _select_layers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Give (parent, whole name, layer) of each linear layer that is held in 4 bits."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    found = False
    for path, parent in model.named_modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and layer is not head:
                found = True
                yield parent, f"{path}.{name}", layer
    if not found:
        raise ValueError("The model has no linear layers that could be held in 4 bits.")


def _quantize(weight: torch.Tensor, quantization: Quantization, double_quantization: bool) -> tuple[torch.Tensor, QuantState]:
    kind = quantization.value.lower()
    data, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quantization, quant_type=kind)
    return data, state
