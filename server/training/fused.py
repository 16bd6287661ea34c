"""Layers with fewer passes over memory than their originals: LoRA beside a frozen linear layer, RMSNorm.

Each replaces the class of an existing module, which keeps its parameters and names; `fuse` does so only where it computes the same.
"""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd import Function

from server.training.autograd import apply_function


class _LoraFunction(Function):
    """y = x W' + b + s (x A') B' with W frozen; A, B in float32, computed in x's type.

    x [T, I], W [O, I], A [R, I], B [O, R]. Keeps x and x A' for the backward pass, nothing of size [T, O].
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        a_cast, b_cast = a.to(x.dtype), (b * scaling).to(x.dtype)
        low = x @ a_cast.t()
        out = nn.functional.linear(x, weight, bias).addmm_(low, b_cast.t())
        ctx.save_for_backward(x, weight, low, a_cast, b_cast)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, low, a_cast, b_cast = ctx.saved_tensors
        gradient = upstream[0]
        low_gradient = gradient @ b_cast
        x_gradient = (gradient @ weight).addmm_(low_gradient, a_cast) if ctx.needs_input_grad[0] else None
        a_gradient = (low_gradient.t() @ x).float()
        b_gradient = (gradient.t() @ low).float().mul_(ctx.scaling)
        return x_gradient, None, None, a_gradient, b_gradient, None


class FusedLoraLinear(LoraLinear):
    """peft's LoRA layer with one active adapter on a plain linear layer; anything else takes peft's own way."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute [..., I] to [..., O]."""
        if not self._is_plain(args, kwargs):
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        base = self.get_base_layer()
        flat = x.reshape(-1, x.shape[-1])
        out = apply_function(
            _LoraFunction, flat, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    def _is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        base = self.get_base_layer()
        dropout = self.lora_dropout[name]
        drops = self.training and not isinstance(dropout, nn.Identity)
        return (
            name in self.lora_A
            and not drops
            and name not in self.lora_variant
            and type(base) is nn.Linear
            and not base.weight.requires_grad
        )


class _RmsNormFunction(Function):
    """y = w x / rms(x), with w frozen; statistics in float32. Keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return wide.mul_(inverse).to(x.dtype) * weight if x.dtype != torch.float32 else wide * inverse * weight

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        scaled = (upstream[0] * weight).float()
        normal = x.float() * inverse
        mean = (scaled * normal).mean(-1, keepdim=True)
        return scaled.sub_(normal.mul_(mean)).mul_(inverse).to(x.dtype), None, None


class FusedRmsNorm(nn.Module):
    """RMSNorm with a frozen weight, whatever the architecture calls its epsilon."""

    weight: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return apply_function(_RmsNormFunction, x, self.weight, _epsilon(self))


def _epsilon(module: nn.Module) -> float:
    found = next((getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)), None)
    return float(cast(float, found)) if found is not None else 1e-6


def fuse(model: nn.Module) -> int:
    """Swap in the fused layers where they fit and agree with the originals; give how many."""
    fused = 0
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = FusedLoraLinear
            fused += 1
        elif type(module).__name__.endswith("RMSNorm") and _agrees_fused(module):
            module.__class__ = FusedRmsNorm
            fused += 1
    return fused


def _agrees_fused(module: nn.Module) -> bool:
    """Tell whether this RMSNorm is the common one (Gemma's, for one, adds 1 to its weight)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or weight.dim() != 1 or weight.is_meta:
        return False
    probe = torch.linspace(-2.0, 3.0, 4 * len(weight), device=weight.device).view(4, -1).to(weight.dtype)
    with torch.no_grad():
        expected, got = module(probe), apply_function(_RmsNormFunction, probe, weight, _epsilon(module))
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return torch.allclose(expected.float(), got.float(), rtol=tolerance, atol=tolerance)
