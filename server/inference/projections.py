"""Linear projections as the engine runs them: weights packed for the CPU, and low-rank adapters of several requests added in one batch.

The pool of adapter ranks is shared by all projections; `lora.py` fills it, `selection.py` says which of its ranks a pass uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from server.inference.kernels.lowrank import LowRankSum
from server.inference.kernels.team import find_team_for
from server.inference.selection import AdapterSelection, RankUse


@dataclass
class RankPool:
    """The A [ranks, parts, in] and B [part: ranks, out] matrices of all loaded adapters at one projection; scales are folded into B."""

    down: torch.Tensor
    up: list[torch.Tensor] = field(default_factory=list)


def is_packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether oneDNN has a layout of its own for such weights here."""
    return device.type == "cpu" and dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear:
    """y = x W' + b, with W laid out once for oneDNN's bf16 kernels where the processor has them; otherwise torch's own linear."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        packable = is_packable(weight.dtype, weight.device)
        self._packed: torch.Tensor | None = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if packable else None
        self._weight: torch.Tensor | None = None if packable else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._weight is not None:
            return functional.linear(x, self._weight, self.bias)
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return output


class Projection(nn.Module):
    """One or more linear layers with the same input, run as one product, plus the low-rank products of the rows' adapters.

    Shape: [rows, tokens, in] -> [rows, tokens, sum of the parts' out].
    """

    def __init__(self, parts: Sequence[nn.Module], selection: AdapterSelection) -> None:
        super().__init__()
        self._selection = selection
        self.pool: RankPool | None = None
        self._sum: LowRankSum | None = None
        self.in_features, self.part_features = _measure_parts(parts)
        self._module: nn.Module | None = None
        self._packed: PackedLinear | None = None
        if all(isinstance(part, nn.Linear) for part in parts):
            self._packed = _pack([part for part in parts if isinstance(part, nn.Linear)])
        elif len(parts) == 1:
            self._module = parts[0]
        else:
            raise ValueError("only linear layers can be merged")

    def use(self, pool: RankPool) -> None:
        """Take adapters from this pool from now on."""
        team = find_team_for(pool.down.dtype, pool.down.device)
        self.pool, self._sum = pool, None if team is None else LowRankSum(team, pool.down, pool.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project, and add what the rows' adapters say."""
        base: torch.Tensor = self._packed(x) if self._packed is not None else self._module(x)  # type: ignore[misc]  # one of the two is set
        chosen = self._selection.current
        if chosen.first == chosen.last or self.pool is None:
            return base
        if self._sum is not None:
            self._sum.add(base, x.contiguous(), chosen.spans)
            return base
        return self._add_adapters(base, x, self.pool, chosen)

    def _add_adapters(self, base: torch.Tensor, x: torch.Tensor, pool: RankPool, chosen: RankUse) -> torch.Tensor:
        """Add (x A') B in place: one product for all parts' A, then one per part into its columns, each reading only its own weights."""
        down = pool.down[chosen.first : chosen.last]
        ranks, parts, width = down.shape
        inner = functional.linear(x, down.view(ranks * parts, width)).view(*x.shape[:-1], ranks, parts)
        if chosen.foreign is not None:
            inner.masked_fill_(chosen.foreign.unsqueeze(-1), 0)
        by_part = inner.view(-1, ranks, parts).permute(2, 0, 1).contiguous() if parts > 1 else inner.view(1, -1, ranks)
        columns, start = base.view(-1, base.shape[-1]), 0
        for part, up in enumerate(pool.up):
            columns.narrow(1, start, up.shape[1]).addmm_(by_part[part], up[chosen.first : chosen.last])
            start += up.shape[1]
        return base


def _measure_parts(parts: Sequence[nn.Module]) -> tuple[int, list[int]]:
    """Give the common input width and each part's output width; transformers' Conv1D keeps its weight as [in, out]."""
    sizes = []
    for part in parts:
        weight = part.weight
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise ValueError(f"{type(part).__name__} has no weight matrix")
        rows, columns = weight.shape
        sizes.append((columns, rows) if isinstance(part, nn.Linear) else (rows, columns))
    if len({size[0] for size in sizes}) != 1:
        raise ValueError("merged layers must have the same input")
    return sizes[0][0], [size[1] for size in sizes]


def _pack(parts: Sequence[nn.Linear]) -> PackedLinear:
    if len(parts) == 1:
        return PackedLinear(parts[0].weight.detach(), None if parts[0].bias is None else parts[0].bias.detach())
    weight = torch.cat([part.weight.detach() for part in parts])
    if all(part.bias is None for part in parts):
        return PackedLinear(weight, None)
    biases = [part.bias.detach() if part.bias is not None else weight.new_zeros(part.out_features) for part in parts]
    return PackedLinear(weight, torch.cat(biases))
