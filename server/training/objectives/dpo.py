"""Direct preference optimisation (Rafailov et al. 2023, equation 7) on pairs of a chosen and a rejected answer.

The reference is the model as it was before the first step: its log-probabilities come with the batch, no second model is held.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from server.training.batches import MicroBatch
from server.training.objectives.objective import TokenLosses, sum_by_sequence


@dataclass(frozen=True, slots=True)
class Dpo:
    """-log sigmoid(beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))), q the reference, mean over pairs."""

    beta: float
    needs_reference: ClassVar[bool] = True

    def count(self, batch: MicroBatch) -> float:
        """Give the number of pairs."""
        return len(batch.lengths) / 2

    def sum_loss(self, network: TokenLosses, batch: MicroBatch) -> torch.Tensor:
        """Give the loss summed over pairs. A batch without reference (a probe's) is taken against probability one."""
        gains = -sum_by_sequence(network.token_losses(batch), batch)
        if batch.reference is not None:
            gains = gains - batch.reference
        return -logsigmoid(self.beta * (gains[0::2] - gains[1::2])).sum()
