"""Tells whether a merged model says what the adapter beside its base says: logits of the same prompts, before and after rounding."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from server.domain.jobs import FailureReason, JobFailure

# Limits of the mean and of the largest difference, as parts of the logits' standard deviation. Measured on SmolLM2-135M with LoRA and DoRA:
# in float32 3e-6 and 1e-4, with weights rounded to bf16 (8 bits) 6e-3 and 8e-2. A layer that is merged wrongly costs far more. Few steps
# move many weights by less than bf16 can tell, and rounding loses that: 6e-2 in the mean after 2 steps of QLoRA.
EXACT_LIMITS, ROUNDED_LIMITS = (1e-4, 1e-2), (4e-2, 1.0)
# What rounding may lose at most of the adapter's own effect, in the mean.
MAX_LOST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two models' logits lie apart: mean and largest absolute difference."""

    mean: float
    largest: float

    def is_within(self, limits: tuple[float, float], spread: float) -> bool:
        """Tell whether both are at most their share of the spread; false for what is not finite."""
        return self.mean <= limits[0] * spread and self.largest <= limits[1] * spread


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """What was measured: the merge in float32, the same with rounded weights, both against the adapter beside its base.

    `effect` is how far the adapter moves the base's logits, `spread` the standard deviation of the adapter's logits.
    """

    exact: Difference
    rounded: Difference
    effect: Difference
    spread: float

    @property
    def keeps_rounded(self) -> bool:
        """Tell whether rounded weights still say what the adapter says."""
        return self.rounded.is_within(ROUNDED_LIMITS, self.spread) and self.rounded.mean <= MAX_LOST_SHARE * self.effect.mean

    @property
    def metrics(self) -> Mapping[str, float]:
        """The figures by name, as a result shows them."""
        return {
            "merge_mean_logit_difference": self.exact.mean,
            "merge_largest_logit_difference": self.exact.largest,
            "merge_rounded_mean_logit_difference": self.rounded.mean,
            "merge_rounded_largest_logit_difference": self.rounded.largest,
            "merge_mean_logit_effect": self.effect.mean,
            "merge_logit_spread": self.spread,
        }

    def require_exactness(self) -> None:
        """Raise JobFailure(ARTIFACT_INVALID), with the figures, where the merged model in float32 says something else than the adapter."""
        if self.exact.is_within(EXACT_LIMITS, self.spread):
            return
        raise JobFailure(
            FailureReason.ARTIFACT_INVALID,
            f"The merged model does not say what the adapter says: logits with a standard deviation of {self.spread:.3g} differ by"
            f" {self.exact.mean:.3g} in the mean and {self.exact.largest:.3g} at most.",
            "Export the version as ADAPTER.",
        )


@torch.inference_mode()
def take_logits(model: nn.Module, probes: Sequence[Sequence[int]]) -> torch.Tensor:
    """Give the logits [all tokens of all probes, vocabulary] as float32."""
    device = next(model.parameters()).device
    found = [model(input_ids=torch.tensor([list(probe)], device=device), use_cache=False).logits[0].float() for probe in probes]
    return torch.cat(found)


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> Difference:
    """Compare two models' logits for the same probes."""
    difference = (ours - theirs).abs()
    return Difference(float(difference.mean()), float(difference.max()))


@contextmanager
def rounded_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute with every weight rounded to a type's numbers but held in its own type: what differs then is rounding alone.

    A module's weights are rounded as it is called and put back after: no second copy of the model is held.
    """
    kept: dict[nn.Parameter, torch.Tensor] = {}

    def round_own(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            kept[parameter] = parameter.data
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)

    def put_back(module: nn.Module, _: Any, __: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept.pop(parameter)

    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [hook for module in owners for hook in (module.register_forward_pre_hook(round_own), module.register_forward_hook(put_back))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
