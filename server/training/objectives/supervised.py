"""Likelihood of the trained tokens: the mean cross entropy, each token weighted as its message is."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from server.training.batches import MicroBatch
from server.training.objectives.objective import TokenLosses


@dataclass(frozen=True, slots=True)
class Supervised:
    """Fine-tuning on answers, completions or plain text; which tokens count is the data's affair."""

    needs_reference: ClassVar[bool] = False

    def count(self, batch: MicroBatch) -> float:
        """Give the sum of the trained tokens' weights."""
        return float(batch.weights.sum())

    def sum_loss(self, network: TokenLosses, batch: MicroBatch) -> torch.Tensor:
        """Give the weighted sum of cross entropies."""
        return network.sum_loss(batch)
