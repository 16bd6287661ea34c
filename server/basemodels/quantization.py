"""Holds a model's linear layers in 4 bits (Dettmers et al. 2023), or gives them the values that 4 bits keep of them.

Kernels and format are bitsandbytes'. The layer's forward pass is not: on a CPU bitsandbytes repacks the weights of a layer that evaluates
and rounds their scales, so that evaluating once would change what is trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from torch.autograd import Function
from torch.nn.functional import linear
from transformers import PreTrainedModel

from server.domain.techniques import Quantization

# Weights that share one scale; bitsandbytes' own and the paper's.
BLOCK_SIZE = 64
# Scales that share one of their own, where they are quantised too.
SCALE_BLOCK_SIZE = 256
# Weights that are quantised at once.
SLICE_WEIGHTS = 1 << 20


@dataclass(frozen=True, slots=True)
class FourBits:
    """How linear layers are held. `compute_dtype` None: the model's own; `note` is told each layer's name, weight and 4-bit form."""

    quantization: Quantization
    double: bool
    compute_dtype: torch.dtype | None = None
    note: "Note | None" = None


class QuantizedLinear(Linear4bit):
    """A frozen linear layer in 4 bits. De-quantised for each pass; nothing of the weight's size is kept for the backward pass."""

    compute_dtype: torch.dtype
    # What a technique notes of its weight until it needs it.
    noted: object = None

    @classmethod
    def beside(cls, layer: nn.Linear, compute_dtype: torch.dtype) -> "QuantizedLinear":
        """Make one of a layer's shape and with its bias, still without a weight."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, bias=False, compute_dtype=compute_dtype)
        made.bias = layer.bias
        return made

    @classmethod
    def of(cls, layer: nn.Linear, quantization: Quantization, double_quantization: bool, compute_dtype: torch.dtype) -> "QuantizedLinear":
        """Quantise a layer. The original is left as it was."""
        made = cls.beside(layer, compute_dtype)
        made.take("", layer.weight.detach(), FourBits(quantization, double_quantization))
        return made

    def take(self, name: str, weight: torch.Tensor, held: FourBits) -> None:
        """Hold what 4 bits keep of a weight [O, I]."""
        data, state = _quantize(weight, held.quantization, held.double)
        state.dtype = self.compute_dtype  # the type that comes out
        self.quant_state = state
        self.weight = Params4bit(
            data, requires_grad=False, quant_state=state, blocksize=BLOCK_SIZE, compress_statistics=held.double,
            quant_type=held.quantization.value.lower(), module=self, bnb_quantized=True,
        )  # fmt: skip
        if held.note is not None:
            held.note(name, weight, self)

    def dequantize(self) -> torch.Tensor:
        """Give the weight [O, I] in the compute type."""
        return dequantize_4bit(self.weight, self.quant_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [..., I] to [..., O]."""
        return cast(torch.Tensor, _QuantizedLinearFunction.apply(x, self))  # type: ignore[no-untyped-call]  # torch leaves it untyped


Note = Callable[[str, torch.Tensor, QuantizedLinear], None]


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


def quantize(model: PreTrainedModel, held: FourBits) -> None:
    """Replace the linear layers, all but the output head, by frozen ones in 4 bits. Raises ValueError when the model has no such layer."""
    for name, (layer, made) in replace_linears(model, held).items():
        made.take(name, layer.weight.detach(), held)


def replace_linears(model: PreTrainedModel, held: FourBits) -> dict[str, tuple[nn.Linear, QuantizedLinear]]:
    """Put layers that have no weights yet in the place of the same ones; give both by name. Raises ValueError when there is none."""
    replaced = {}
    for parent, name, layer in list(_select_layers(model)):
        made = QuantizedLinear.beside(layer, held.compute_dtype or model.dtype)
        setattr(parent, name.rpartition(".")[2], made)
        replaced[name] = (layer, made)
    return replaced


def is_quantized(model: nn.Module) -> bool:
    """Tell whether layers of it are held in 4 bits."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


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
    """Do what bitsandbytes' quantize_4bit does, in slices: on a CPU it takes some 30 bytes per weight meanwhile."""
    kind = quantization.value.lower()
    slices = torch.split(weight.contiguous().view(-1), SLICE_WEIGHTS)
    parts = [quantize_4bit(part, blocksize=BLOCK_SIZE, compress_statistics=False, quant_type=kind) for part in slices]
    data = torch.cat([part for part, _ in parts])
    scales = torch.cat([state.absmax for _, state in parts])
    shared = {"shape": weight.shape, "code": parts[0][1].code, "blocksize": BLOCK_SIZE, "quant_type": kind, "dtype": weight.dtype}
    if not double_quantization:
        return data, QuantState(absmax=scales, **shared)  # type: ignore[no-untyped-call]  # bitsandbytes leaves it untyped
    offset = scales.mean()
    narrow, state = quantize_blockwise(scales - offset, blocksize=SCALE_BLOCK_SIZE)
    return data, QuantState(absmax=narrow, offset=offset, state2=state, **shared)  # type: ignore[no-untyped-call]  # as above
