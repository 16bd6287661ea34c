"""Each objective's losses and gradients are those of its paper's formula, written out here over whole logits of plain transformers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid
from transformers import PreTrainedModel

from server.basemodels.loading import load_causal_model
from server.datafiles.tokens import TokenizedRecords
from server.domain import specs
from server.domain.techniques import LoraTechnique
from server.training.batches import Examples
from server.training.network import Network
from server.training.objectives.dpo import Dpo
from server.training.objectives.objective import Objective, choose_objective
from server.training.objectives.orpo import Orpo
from server.training.objectives.reference import compute_reference
from server.training.objectives.supervised import Supervised
from server.training.techniques.apply import apply_technique
from server.training.techniques.trained import Trained
from tests.tiny_models import build_tiny_causal_model
from tests.training.building import make_parameters, make_sequences

STRENGTH = 0.3
LENGTHS = (14, 9, 23, 17, 8, 31)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny model whose adapters no longer are what they started as: the reference differs from it."""
    model = load_causal_model(build_tiny_causal_model(tmp_path_factory.mktemp("base")), dtype=torch.float32)
    made = apply_technique(model, LoraTechnique(rank=4, alpha=8.0), seed=1, total_steps=1)
    move(made)
    return made


def move(trained: Trained, scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


@pytest.fixture(scope="module")
def pairs() -> TokenizedRecords:
    return make_sequences(LENGTHS, sequences_per_record=2)


def log_probabilities(trained: Trained, records: TokenizedRecords, sequence: int) -> torch.Tensor:
    """Give the log-probability of each trained token of one sequence, by the model's plain forward pass."""
    ids = torch.from_numpy(records.token_ids(sequence)).long()
    logits = trained.model(input_ids=ids[None], use_cache=False).logits[0].float()
    each = log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
    return each[torch.from_numpy(records.trained_mask(sequence)[1:])]


def sum_supervised(trained: Trained, records: TokenizedRecords, reference: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(())
    for sequence in range(len(LENGTHS)):
        weights = torch.from_numpy(records.weights(sequence))
        total = total - (weights[weights > 0] * log_probabilities(trained, records, sequence)).sum()
    return total


def sum_dpo(trained: Trained, records: TokenizedRecords, reference: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(())
    for pair in range(len(records)):
        chosen, rejected = (log_probabilities(trained, records, 2 * pair + place).sum() for place in (0, 1))
        policy_ratio = chosen - rejected
        reference_ratio = reference[2 * pair] - reference[2 * pair + 1]
        total = total - logsigmoid(STRENGTH * (policy_ratio - reference_ratio))
    return total


def sum_orpo(trained: Trained, records: TokenizedRecords, reference: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(())
    for pair in range(len(records)):
        chosen, rejected = (log_probabilities(trained, records, 2 * pair + place).mean() for place in (0, 1))
        odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in (chosen, rejected)]
        total = total - chosen - STRENGTH * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    return total


CASES: dict[str, tuple[Objective, Callable[[Trained, TokenizedRecords, torch.Tensor], torch.Tensor]]] = {
    "supervised": (Supervised(), sum_supervised),
    "dpo": (Dpo(STRENGTH), sum_dpo),
    "orpo": (Orpo(STRENGTH), sum_orpo),
}


def gradients_of(trained: Trained, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    values = torch.autograd.grad(loss, list(trained.parameters.values()))
    return dict(zip(trained.parameters, values, strict=True))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_formula(trained: Trained, pairs: TokenizedRecords, name: str, packing: bool) -> None:
    objective, formula = CASES[name]
    records = make_sequences(LENGTHS) if name == "supervised" else pairs
    reference = -torch.arange(20.0, 20.0 + len(LENGTHS))
    causal = trained.peft.get_base_model()
    assert isinstance(causal, PreTrainedModel)
    attention = causal.config._attn_implementation
    expected = formula(trained, records, reference)
    expected_gradients = gradients_of(trained, expected)
    network = Network(trained.model, packing=packing)
    assert network.packed is packing
    batch = Examples(records, reference if objective.needs_reference else None).lay_out(range(len(records)))
    loss = objective.sum_loss(network, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for parameter, gradient in gradients_of(trained, loss).items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=2e-3, atol=2e-4)
    causal.set_attn_implementation(attention)


def test_the_mean_is_over_weights_or_pairs(pairs: TokenizedRecords) -> None:
    records = make_sequences(LENGTHS)
    weights = sum(float(records.weights(sequence).sum()) for sequence in range(len(LENGTHS)))
    assert Supervised().count(Examples(records).lay_out(range(len(LENGTHS)))) == pytest.approx(weights)
    batch = Examples(pairs).lay_out([0, 2])
    assert Dpo(STRENGTH).count(batch) == Orpo(STRENGTH).count(batch) == 2


def test_the_reference_is_the_model_as_it_stands_whatever_the_micro_batches(trained: Trained, pairs: TokenizedRecords) -> None:
    network = Network(trained.model)
    for max_tokens in (1, 50, 1000):
        judged = compute_reference(network, Examples(pairs), max_tokens, lambda: None)
        assert judged.reference is not None
        for sequence in range(len(LENGTHS)):
            expected = float(log_probabilities(trained, pairs, sequence).detach().sum())
            assert float(judged.reference[sequence]) == pytest.approx(expected, rel=1e-4)


def test_dpo_starts_at_log_two_and_prefers_the_chosen_answers_once_it_has_learnt(tmp_path: Path, pairs: TokenizedRecords) -> None:
    model = load_causal_model(build_tiny_causal_model(tmp_path), dtype=torch.float32)
    started = apply_technique(model, LoraTechnique(rank=4, alpha=8.0), seed=1, total_steps=1)
    network = Network(started.model)
    batch = compute_reference(network, Examples(pairs), 1000, lambda: None).lay_out(range(3))
    optimiser = torch.optim.SGD(started.parameters.values(), lr=0.5)
    losses = []
    for _ in range(5):
        loss = Dpo(STRENGTH).sum_loss(network, batch) / 3
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("objective", list(specs.Objective))
def test_the_parameters_choose_the_objective_and_its_strength(objective: specs.Objective) -> None:
    chosen = choose_objective(replace(make_parameters(), objective=objective, preference_strength=0.25))
    expected = {specs.Objective.SUPERVISED: Supervised(), specs.Objective.DPO: Dpo(0.25), specs.Objective.ORPO: Orpo(0.25)}
    assert chosen == expected[objective]
