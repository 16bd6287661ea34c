"""What the starting model thinks of every sequence: computed once, before the first step or a checkpoint changes it."""

from collections.abc import Callable

import torch

from server.training.batches import Examples
from server.training.network import Network
from server.training.objectives.objective import sum_by_sequence


def compute_reference(network: Network, examples: Examples, max_tokens: int, check: Callable[[], None]) -> Examples:
    """Give the examples with log-probabilities of their sequences' trained tokens: float32 [S], in the order of the sequences.

    Without dropout and in the same micro-batches each time, so that a resumed job has the same numbers. `check` may raise to end it.
    """
    reference = torch.zeros(len(examples) * examples.records.sequences_per_record)
    was_training = network.model.training
    network.model.eval()
    with torch.no_grad():
        for group in examples.split(range(len(examples)), max_tokens):
            check()
            batch = examples.lay_out(group).to(network.model.device)
            sequences = [sequence for index in group for sequence in examples.records.sequences_of(index)]
            reference[sequences] = -sum_by_sequence(network.token_losses(batch), batch).float().cpu()
    network.model.train(was_training)
    return Examples(examples.records, reference)
