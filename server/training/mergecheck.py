"""Tells whether a merged model says what the adapter beside its base says: logits of the same prompts, before and after rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from server.domain.jobs import FailureReason, JobFailure

# Limits of the mean and of the largest difference, as parts of the logits' standard deviation. Measured on SmolLM2-135M with LoRA and DoRA:
# in float32 3e-6 and 1e-4, with weights rounded to bf16 (8 bits) 6e-3 and 8e-2. A layer that is merged wrongly costs far more.
EXACT_LIMITS, ROUNDED_LIMITS = (1e-4, 1e-2), (4e-2, 1.0)


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
    """What was measured: the merge in float32, the same with rounded weights, and the standard deviation of the adapter's logits."""

    exact: Difference
    rounded: Difference
    spread: float

    @property
    def metrics(self) -> Mapping[str, float]:
        """The figures by name, as a result shows them."""
        return {
            "merge_mean_logit_difference": self.exact.mean,
            "merge_largest_logit_difference": self.exact.largest,
            "merge_rounded_mean_logit_difference": self.rounded.mean,
            "merge_rounded_largest_logit_difference": self.rounded.largest,
            "merge_logit_spread": self.spread,
        }

    def require_exactness(self) -> None:
        """Raise JobFailure(ARTIFACT_INVALID), with the figures, where the merged model says something else than the adapter."""
        if self.exact.is_within(EXACT_LIMITS, self.spread) and self.rounded.is_within(ROUNDED_LIMITS, self.spread):
            return
        raise JobFailure(
            FailureReason.ARTIFACT_INVALID,
            f"The merged model does not say what the adapter says: logits with a standard deviation of {self.spread:.3g} differ by"
            f" {self.exact.mean:.3g} in the mean and {self.exact.largest:.3g} at most in float32, by {self.rounded.mean:.3g} and"
            f" {self.rounded.largest:.3g} after rounding to bfloat16.",
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


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every weight to a type's numbers, and leave it in its own: what is measured then is the rounding of the weights alone."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
