"""The operations between products: the root-mean-square norm with the residual sum before it, and the gated activation."""

import ctypes

import numpy as np
import torch

from server.inference.kernels.memory import load, load_half, load_integer, store_half
from server.inference.kernels.products import compiled, exponentiate
from server.inference.kernels.team import FIRST_OWN, HALF_BYTES, Block, Kernel, Team, thread_count, thread_number

_ROWS, _WIDTH, _EPSILON, _WEIGHT, _HIDDEN, _ADDED, _SUM, _OUT = range(FIRST_OWN, FIRST_OWN + 8)


@compiled
def _add_row(hidden: int, added: int, out: int, width: int) -> None:
    for i in range(width):
        store_half(out, i, load_half(hidden, i) + load_half(added, i))


@compiled
def _normalize_row(hidden: int, weight: int, epsilon: np.float32, out: int, width: int) -> None:
    squares = np.float32(0)
    for i in range(width):
        squares += load_half(hidden, i) * load_half(hidden, i)
    scale = np.float32(1) / np.sqrt(squares / np.float32(width) + epsilon)
    for i in range(width):
        store_half(out, i, load_half(hidden, i) * scale * load_half(weight, i))


def _normalize(block: int) -> None:
    """Normalise this thread's share of the rows, after adding to them what there is to add."""
    rows, width, number, count = load_integer(block, _ROWS), load_integer(block, _WIDTH), thread_number(), thread_count()
    epsilon, added = load(load_integer(block, _EPSILON), 0), load_integer(block, _ADDED)
    for row in range(rows * number // count, rows * (number + 1) // count):
        offset = row * width * HALF_BYTES
        hidden = load_integer(block, _HIDDEN) + offset
        if added != 0:
            total = load_integer(block, _SUM) + offset
            _add_row(hidden, added + offset, total, width)
            hidden = total
        _normalize_row(hidden, load_integer(block, _WEIGHT), epsilon, load_integer(block, _OUT) + offset, width)


@compiled
def _gate_row(gate: int, up: int, out: int, width: int) -> None:
    for i in range(width):
        x = load_half(gate, i)
        store_half(out, i, x / (np.float32(1) + exponentiate(-x)) * load_half(up, i))


def _gate(block: int) -> None:
    """Do silu(gate) x up for this thread's share of the rows."""
    rows, width, number, count = load_integer(block, _ROWS), load_integer(block, _WIDTH), thread_number(), thread_count()
    for row in range(rows * number // count, rows * (number + 1) // count):
        gate = load_integer(block, _HIDDEN) + 2 * row * width * HALF_BYTES
        _gate_row(gate, gate + width * HALF_BYTES, load_integer(block, _OUT) + row * width * HALF_BYTES, width)


_NORM, _GATE = Kernel(_normalize), Kernel(_gate)
# What an exponential costs beside a product and a sum.
_EXPONENTIAL_WORK = 10


class Norm:
    """Root-mean-square norm over the last dimension."""

    def __init__(self, team: Team, weight: torch.Tensor, epsilon: float) -> None:
        self._team, self._weight, self._epsilon = team, weight, ctypes.c_float(epsilon)
        self._block = Block(0, weight.shape[0], ctypes.addressof(self._epsilon), weight.data_ptr(), 0, 0, 0, 0)

    def normalize(self, hidden: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Give hidden + added (hidden itself where nothing is added), and that normalised; all [..., width]."""
        hidden, added = hidden.contiguous(), None if added is None else added.contiguous()
        values, out = self._block.values, torch.empty_like(hidden)
        total = hidden if added is None else torch.empty_like(hidden)
        values[_ROWS], values[_HIDDEN], values[_OUT] = hidden.numel() // values[_WIDTH], hidden.data_ptr(), out.data_ptr()
        values[_ADDED], values[_SUM] = 0 if added is None else added.data_ptr(), total.data_ptr()
        self._team.run(_NORM, self._block, 2 * hidden.numel())
        return total, out


class Gate:
    """silu(gate) x up."""

    def __init__(self, team: Team) -> None:
        self._team, self._block = team, Block(*[0] * 8)

    def apply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Give [..., width] for gate and up side by side, [..., 2 x width]."""
        gate_up = gate_up.contiguous()
        values, width = self._block.values, gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        values[_ROWS], values[_WIDTH], values[_HIDDEN], values[_OUT] = out.numel() // width, width, gate_up.data_ptr(), out.data_ptr()
        self._team.run(_GATE, self._block, _EXPONENTIAL_WORK * out.numel())
        return out
