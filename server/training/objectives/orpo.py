"""Odds ratio preference optimisation (Hong et al. 2024, equations 6 and 7) on pairs of a chosen and a rejected answer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from server.training.batches import MicroBatch
from server.training.objectives.objective import TokenLosses, sum_by_sequence

# A mean log-probability of zero has infinite odds: it stops this far (float32) before.
LARGEST_LOG_PROBABILITY = -1e-6


@dataclass(frozen=True, slots=True)
class Orpo:
    """nll(chosen) - strength log sigmoid(log odds(chosen) - log odds(rejected)), mean over pairs.

    Probabilities are means over an answer's tokens, so long answers count no more than short ones. As in the paper the likelihood
    is the answer's alone; TRL adds the prompt's tokens and takes the mean over the tokens of a batch.
    """

    strength: float
    needs_reference: ClassVar[bool] = False

    def count(self, batch: MicroBatch) -> float:
        """Give the number of pairs."""
        return len(batch.lengths) / 2

    def sum_loss(self, network: TokenLosses, batch: MicroBatch) -> torch.Tensor:
        """Give the loss summed over pairs."""
        losses = network.token_losses(batch)
        means = sum_by_sequence(losses, batch) / sum_by_sequence(torch.ones_like(losses), batch)
        log_odds = _log_odds(-means)
        return (means[0::2] - self.strength * logsigmoid(log_odds[0::2] - log_odds[1::2])).sum()


def _log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p."""
    bounded = log_probability.clamp(max=LARGEST_LOG_PROBABILITY)
    return bounded - torch.log(-torch.expm1(bounded))
