"""Computes a transformer's linear layers with integers of 8 bits: rows of states against weights by output channel. Knows no model.

Both are cut to 8 bits here and nothing is calibrated, so that no result depends on data seen before. Each token's states have a range of
their own: a vector does not depend on what else is in its batch, and one large token costs the others nothing. (A range for a whole
batch, as ONNX Runtime's DynamicQuantizeLinear and torch.ao's dynamic layers take it, does both.)
"""

import torch
from torch import Tensor, nn

# Weights: -127 to 127, symmetric. States: 0 to 255, from a token's smallest to its largest.
WEIGHT_LEVELS = 127
STATE_LEVELS = 255
# What lies between the steps stays in the processor's caches: measured on MiniLM's layers and on BERT base's, up to four times as fast.
ROWS_AT_ONCE = 512
# Of a token whose states are all alike: any scale above zero does.
LEAST_SCALE = 1e-12


def multiplies_bytes() -> bool:
    """Tell whether the processor multiplies bytes into 32 bits (VNNI, AMX): others are slow at it, and some cut off what overflows."""
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


class IntegerLinear(nn.Module):
    """What a linear layer gives, nearly: weights of a byte each, packed for the processor."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scales = (weight.abs().amax(dim=1) / WEIGHT_LEVELS).clamp_(min=LEAST_SCALE)
        levels = (weight / scales[:, None]).round_()
        self._packed = torch.ops.onednn.qlinear_prepack(levels.to(torch.int8), None)
        self._scales = scales
        self._zeros = torch.zeros_like(scales, dtype=torch.int64)
        self._sums = levels.sum(dim=1) * scales
        self._bias = torch.zeros_like(scales) if layer.bias is None else layer.bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """Give float32 [..., outputs] for float32 [..., inputs]."""
        rows = states.reshape(-1, states.shape[-1])
        given = torch.empty(len(rows), len(self._scales))
        for first in range(0, len(rows), ROWS_AT_ONCE):
            self._multiply(rows[first : first + ROWS_AT_ONCE], given[first : first + ROWS_AT_ONCE])
        return given.reshape(*states.shape[:-1], len(self._scales))

    def _multiply(self, rows: Tensor, given: Tensor) -> None:
        # A row is low + level * step; times the weights that is low * (sum of the weights) + step * (levels times the weights).
        low = rows.amin(dim=1, keepdim=True)
        step = ((rows.amax(dim=1, keepdim=True) - low) / STATE_LEVELS).clamp_(min=LEAST_SCALE)
        inverse = step.reciprocal()
        # Half a level more, since turning into an integer cuts off. By way of 32 bits: that is faster than at once.
        levels = (rows * inverse).add_(0.5 - low * inverse).to(torch.int32).to(torch.uint8)
        products = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        torch.addcmul(self._bias, low, self._sums, out=given).addcmul_(products, step)


def quantize_linears(model: nn.Module) -> int:
    """Put integers in the place of all linear layers of a model, one after the other; give how many there were."""
    found = 0
    for name, child in list(model.named_children()):
        if type(child) is nn.Linear:
            setattr(model, name, IntegerLinear(child))
            found += 1
        else:
            found += quantize_linears(child)
    return found
