"""Weights that the model computes with in 16 bits and that are trained in float32 (mixed precision, Micikevicius et al. 2017)."""

from collections.abc import Mapping

import torch
from torch import nn


class MasterWeights:
    """A float32 master beside each narrow weight. Gradients are added up in float32; the narrow ones are dropped as they come."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._narrow = {name: weight for name, weight in weights.items() if weight.dtype != torch.float32}
        self.parameters = {
            name: nn.Parameter(weight.detach().float()) if name in self._narrow else weight for name, weight in weights.items()
        }
        for name, weight in self._narrow.items():
            add = _AddTo(self.parameters[name])
            weight.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @torch.no_grad()
    def to_model(self) -> None:
        """Round the masters into the weights that the model computes with."""
        for name, weight in self._narrow.items():
            weight.copy_(self.parameters[name])

    @torch.no_grad()
    def from_model(self) -> None:
        """Take the model's weights as masters."""
        for name, weight in self._narrow.items():
            self.parameters[name].copy_(weight)


class _AddTo:
    """Adds each gradient of a narrow weight to its master's."""

    def __init__(self, master: nn.Parameter) -> None:
        self._master = master

    def __call__(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        if self._master.grad is None:
            self._master.grad = weight.grad.float()
        else:
            self._master.grad.add_(weight.grad)
        weight.grad = None
