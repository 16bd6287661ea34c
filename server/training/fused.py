"""Layers with fewer passes over memory than their originals, or that keep less: LoRA beside a frozen linear layer, RMSNorm, gated MLPs.

Each replaces the class of an existing module, which keeps its parameters and names; `fuse` does so only where it computes the same.
"""

from typing import Any, cast

import torch
from peft.tuners.adalora import SVDLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd import Function
from torch.nn.functional import silu

from server.basemodels.quantization import QuantizedLinear
from server.training.autograd import apply_function


class _LoraFunction(Function):
    """y = x W' + b + s (x A') B' with W frozen; A, B in float32, computed in x's type.

    x [T, I], W [O, I], A [R, I], B [O, R]. Keeps x and x A' for the backward pass, nothing of size [T, O], and of a W in 4 bits
    nothing of its size: it is de-quantised again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        a_cast, b_cast = a.to(x.dtype), (b * scaling).to(x.dtype)
        low = x @ a_cast.t()
        out = nn.functional.linear(x, _weight_of(base), base.bias).addmm_(low, b_cast.t())
        ctx.save_for_backward(x, low, a_cast, b_cast)
        ctx.base, ctx.scaling = base, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a_cast, b_cast = ctx.saved_tensors
        gradient = upstream[0]
        low_gradient = gradient @ b_cast
        x_gradient = (gradient @ _weight_of(ctx.base)).addmm_(low_gradient, a_cast) if ctx.needs_input_grad[0] else None
        a_gradient = (low_gradient.t() @ x).float()
        b_gradient = (gradient.t() @ low).float().mul_(ctx.scaling)
        return x_gradient, None, a_gradient, b_gradient, None


def _weight_of(base: nn.Linear) -> torch.Tensor:
    return base.dequantize() if isinstance(base, QuantizedLinear) else base.weight


def _add_low_rank(x: torch.Tensor, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Compute [..., I] to [..., O]."""
    out = apply_function(_LoraFunction, x.reshape(-1, x.shape[-1]), base, a, b, scaling)
    return out.view(*x.shape[:-1], out.shape[-1])


def _is_frozen_linear(base: nn.Module, x: torch.Tensor) -> bool:
    """Tell whether the function above computes what the layer computes."""
    if isinstance(base, QuantizedLinear):
        return base.compute_dtype == x.dtype
    # Falcon's own class differs from nn.Linear by its rounding alone.
    return (type(base) is nn.Linear or type(base).__name__ == "FalconLinear") and not base.weight.requires_grad


def _drops(layer: Any, names: list[str]) -> bool:
    return layer.training and any(not isinstance(layer.lora_dropout[name], nn.Identity) for name in names)


class FusedLoraLinear(LoraLinear):
    """peft's LoRA layer with plain adapters on a frozen linear layer; anything else takes peft's own way."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute [..., I] to [..., O]."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or not self._is_plain(names) or not _is_frozen_linear(self.get_base_layer(), x):
            return super().forward(x, *args, **kwargs)
        downs = [cast(torch.Tensor, self.lora_A[name].weight) for name in names]
        ups = [cast(torch.Tensor, self.lora_B[name].weight) for name in names]
        several = len(names) > 1  # an adapter and its frozen start
        down, up = (torch.cat(downs), torch.cat(ups, dim=1)) if several else (downs[0], ups[0])
        return _add_low_rank(x, cast(nn.Linear, self.get_base_layer()), down, up, self.scaling[names[0]])

    def _is_plain(self, names: list[str]) -> bool:
        if self.disable_adapters or self.merged or not names or _drops(self, names):
            return False
        same = len({self.scaling[name] for name in names}) == 1
        return same and not any(name in self.lora_variant for name in names)


class FusedSvdLinear(SVDLinear):
    """AdaLoRA's layer: low-rank factors with singular values between them."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute [..., I] to [..., O]."""
        names = self.active_adapters
        base = self.get_base_layer()
        plain = len(names) == 1 and not (args or kwargs or self.disable_adapters or self.merged or _drops(self, names))
        if not plain or not _is_frozen_linear(base, x):
            return super().forward(x, *args, **kwargs)
        name = names[0]
        scaling = self.scaling[name] / (float(self.ranknum[name]) + 1e-5)  # as peft's
        down = cast(torch.Tensor, self.lora_A[name] * self.lora_E[name])
        return _add_low_rank(x, cast(nn.Linear, base), down, cast(torch.Tensor, self.lora_B[name]), scaling)


class _RmsNormFunction(Function):
    """y = w x / rms(x); statistics in float32. Keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return wide.mul_(inverse).to(x.dtype) * weight if x.dtype != torch.float32 else wide * inverse * weight

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normal = x.float() * inverse
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (upstream[0].float() * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, weight_gradient, None
        scaled = (upstream[0] * weight).float()
        mean = (scaled * normal).mean(-1, keepdim=True)
        return scaled.sub_(normal.mul_(mean)).mul_(inverse).to(x.dtype), weight_gradient, None


class FusedRmsNorm(nn.Module):
    """RMSNorm, whatever the architecture calls its epsilon."""

    weight: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return apply_function(_RmsNormFunction, x, self.weight, _epsilon(self))


class _GatedFunction(Function):
    """y = (silu(gate) * up) W' + b, W and b trained. Keeps gate and up [T, I], and computes what lies between again: half as much."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        return nn.functional.linear(silu(gate).mul_(up), weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        gradient, active = upstream[0], silu(gate)
        weight_gradient = gradient.t() @ (active * up)
        bias_gradient = gradient.sum(0) if ctx.needs_input_grad[3] else None
        product_gradient = gradient @ weight
        up_gradient = product_gradient * active
        gate_gradient = torch.ops.aten.silu_backward(product_gradient.mul_(up), gate)
        return gate_gradient, up_gradient, weight_gradient, bias_gradient


def _multiply_gated(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute [..., D] to [..., D] by a module that is a gated MLP."""
    gate, up, down = (cast(nn.Linear, getattr(module, name)) for name in GATED_LAYERS)
    rows = x.flatten(0, -2)
    return apply_function(_GatedFunction, gate(rows), up(rows), down.weight, down.bias).view(x.shape)


def _fuse_gated(module: nn.Module) -> bool:
    """Have a gated MLP, all of whose layers are trained, keep less, where it computes the same so; else leave it."""
    layers = [getattr(module, name, None) for name in GATED_LAYERS]
    trained = all(type(layer) is nn.Linear and layer.weight.requires_grad and not layer.weight.is_meta for layer in layers)
    if not trained or not type(module).__name__.endswith("MLP"):
        return False
    gate = cast(nn.Linear, layers[0])
    probe = torch.linspace(-2.0, 3.0, 4 * gate.in_features, device=gate.weight.device).view(4, -1).to(gate.weight.dtype)
    with torch.no_grad():
        if not torch.equal(module(probe), _multiply_gated(module, probe)):
            return False
    module.__class__ = type(f"Fused{type(module).__name__}", (type(module),), {"forward": _multiply_gated})
    return True


def _epsilon(module: nn.Module) -> float:
    found = next((getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)), None)
    return float(cast(float, found)) if found is not None else 1e-6


GATED_LAYERS = ("gate_proj", "up_proj", "down_proj")
FUSED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {LoraLinear: FusedLoraLinear, SVDLinear: FusedSvdLinear}


def fuse(model: nn.Module) -> int:
    """Swap in the fused layers where they fit and agree with the originals; give how many."""
    fused = 0
    for module in model.modules():
        if type(module) in FUSED_LAYERS:
            module.__class__ = FUSED_LAYERS[type(module)]
            fused += 1
        elif type(module).__name__.endswith("RMSNorm") and _agrees_fused(module):
            module.__class__ = FusedRmsNorm
            fused += 1
        elif _fuse_gated(module):
            fused += 1
    return fused


def _agrees_fused(module: nn.Module) -> bool:
    """Tell whether this RMSNorm is the common one (Gemma's, for one, adds 1 to its weight)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.is_meta:
        return False
    probe = torch.linspace(-2.0, 3.0, 4 * len(weight), device=weight.device).view(4, -1).to(weight.dtype)
    with torch.no_grad():
        expected, got = module(probe), apply_function(_RmsNormFunction, probe, weight, _epsilon(module))
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return torch.allclose(expected.float(), got.float(), rtol=tolerance, atol=tolerance)
