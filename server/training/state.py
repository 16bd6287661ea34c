"""What one run of training works with: handed from preparation to memory trial, loop and result."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from server.childprocess import Signals
from server.domain.events import ChildEvent
from server.domain.specs import TrainingParameters
from server.training.batches import BatchPlan, Examples
from server.training.checkpoint import Position
from server.training.network import Network
from server.training.objectives.objective import Objective
from server.training.sampling import Sampler
from server.training.techniques.trained import Trained

# Measured on SmolLM2, two cores: 1,024 take 0.4 GB more and 5 % longer, for they leave the caches; 384 save little more.
MICRO_BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Way:
    """How a step is computed: in groups of so many tokens, with activations kept or computed again. The maths is the same."""

    micro_batch_tokens: int
    recomputes: bool


@dataclass(slots=True)
class Run:
    """Everything that the loop works with.

    `save` writes a checkpoint, kept beside the latest if it is the best. `way` is how steps are computed; `other_ways` take less
    memory, one after the other.
    """

    network: Network
    trained: Trained
    objective: Objective
    optimiser: torch.optim.Optimizer
    examples: Examples
    held_out: Examples
    plan: BatchPlan
    settings: TrainingParameters
    emit: Callable[[ChildEvent], None]
    signals: Signals
    save: Callable[[Position, bool], None]
    sampler: Sampler | None = None
    way: Way = Way(MICRO_BATCH_TOKENS, recomputes=False)
    other_ways: list[Way] = field(default_factory=list)
