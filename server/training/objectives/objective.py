"""What the loop asks of an objective, and the choice among them. An objective knows losses of tokens, not how they are computed."""

from typing import ClassVar, Protocol

import torch

from server.domain import specs
from server.domain.specs import TrainingParameters
from server.training.batches import MicroBatch


class TokenLosses(Protocol):
    """The model as an objective sees it."""

    def sum_loss(self, batch: MicroBatch) -> torch.Tensor:
        """Give the weighted sum of the trained tokens' cross entropies (nats, float32 scalar)."""
        ...

    def token_losses(self, batch: MicroBatch) -> torch.Tensor:
        """Give each trained token's cross entropy, [N] float32, without weights."""
        ...


class Objective(Protocol):
    """A loss that is a sum over micro-batches divided by a sum of counts, so that a step's split changes nothing."""

    needs_reference: ClassVar[bool]

    def count(self, batch: MicroBatch) -> float:
        """Give what the batch counts in the mean: weights of trained tokens, or pairs."""
        ...

    def sum_loss(self, network: TokenLosses, batch: MicroBatch) -> torch.Tensor:
        """Give the batch's loss, summed over what `count` counts (float32 scalar)."""
        ...


def choose_objective(settings: TrainingParameters) -> Objective:
    """Give the objective that the parameters name."""
    from server.training.objectives.dpo import Dpo
    from server.training.objectives.orpo import Orpo
    from server.training.objectives.supervised import Supervised

    match settings.objective:
        case specs.Objective.SUPERVISED:
            return Supervised()
        case specs.Objective.DPO:
            return Dpo(settings.preference_strength)
        case specs.Objective.ORPO:
            return Orpo(settings.preference_strength)


def sum_by_sequence(values_N: torch.Tensor, batch: MicroBatch) -> torch.Tensor:  # noqa: N803 -- the shape stands in the name
    """Add up the values of each sequence's trained tokens. Gives [S] for the batch's S sequences."""
    return values_N.new_zeros(len(batch.lengths)).index_add(0, batch.sequences, values_N)
