"""Where an adapter's factors start: from the weights' own structure, from the error of 4 bits, or from the data."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from server.training.techniques.factors import Factors

# Directions beside those asked for, and passes over the matrix, by which randomised factors come near the exact ones (Halko et al. 2011).
OVERSAMPLING = 16
POWER_ITERATIONS = 8


def factor_principal(weight: torch.Tensor, rank: int, scaling: float) -> Factors:
    """Give the largest singular directions of a weight [O, I]: `scaling` times their product is its best approximation (PiSSA)."""
    wide = weight.detach().float()
    width = min(rank + OVERSAMPLING, *wide.shape)
    left, values, right = torch.svd_lowrank(wide, q=width, niter=POWER_ITERATIONS)
    roots = (values[:rank] / scaling).sqrt()
    return Factors((right[:, :rank] * roots).t().contiguous(), left[:, :rank] * roots)


def factor_orthonormal(weight: torch.Tensor, rank: int) -> Factors:
    """Give the first columns and rows of a weight's QR decomposition (OLoRA)."""
    orthonormal, triangle = torch.linalg.qr(weight.detach().float())
    return Factors(triangle[:rank].contiguous(), orthonormal[:, :rank].contiguous())


class InputSketch:
    """The directions in which a layer's inputs vary most (EVA), by a randomised sketch [R, I] of all inputs: nothing of their number."""

    def __init__(self, rank: int, inputs: int, generator: torch.Generator) -> None:
        self._rank = rank
        self._generator = generator
        self._sketch = torch.zeros(min(2 * rank + OVERSAMPLING, inputs), inputs)

    def add(self, inputs: torch.Tensor) -> None:
        """Take inputs [..., I] into account."""
        rows = inputs.detach().float().reshape(-1, inputs.shape[-1]).cpu()
        self._sketch += torch.randn(len(self._sketch), len(rows), generator=self._generator) @ rows

    def directions(self) -> torch.Tensor:
        """Give the first `rank` directions, [R, I], orthonormal; fewer inputs than ranks leave directions of no variance."""
        directions: torch.Tensor = torch.linalg.svd(self._sketch, full_matrices=False).Vh[: self._rank]
        return directions


@contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], take: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Hand the inputs of layers to `take` while the context lasts."""
    handles = [layer.register_forward_pre_hook(lambda _, arguments, name=name: take(name, arguments[0])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
