"""What the held-out records say about the weights: the objective's own loss over them, the best so far, and when to give up."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from server.domain.specs import TrainingParameters
from server.training.batches import Examples
from server.training.checkpoint import Position
from server.training.network import Network
from server.training.objectives.objective import Objective


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The mean loss of the held-out records, and what it took."""

    loss: float
    tokens: int
    seconds: float


def evaluate(network: Network, objective: Objective, held_out: Examples, max_tokens: int, check: Callable[[], None]) -> Evaluation:
    """Measure the held-out records by the objective's loss. `check` may raise to end it."""
    began = time.perf_counter()
    network.model.eval()
    loss, count, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for group in held_out.split(range(len(held_out)), max_tokens):
            check()
            batch = held_out.lay_out(group)
            count += objective.count(batch)
            tokens += batch.trained_count
            loss += float(objective.sum_loss(network, batch.to(network.model.device)))
    return Evaluation(loss / count, tokens, time.perf_counter() - began)


def note_loss(position: Position, settings: TrainingParameters, loss: float) -> bool:
    """Note an evaluation's loss in the position; tell whether it is the best of the trained weights.

    The base model's, before the first step, is only what the first ones are compared with: a result must differ from it.
    """
    finite = math.isfinite(loss)
    least_change = settings.early_stopping.min_delta if settings.early_stopping else 0.0
    if finite and (position.patience_loss is None or loss < position.patience_loss - least_change):
        position.patience_loss, position.evaluations_without_improvement = loss, 0
    else:
        position.evaluations_without_improvement += 1
    if position.step == 0:
        position.start_loss = loss if finite else None
        return False
    best = finite and (position.best_loss is None or loss < position.best_loss)
    if best:
        position.best_loss, position.best_step = loss, position.step
    return best


def is_patience_over(settings: TrainingParameters, position: Position) -> bool:
    """Tell whether training stops early."""
    return settings.early_stopping is not None and position.evaluations_without_improvement >= settings.early_stopping.patience
