"""The loop: a step's gradient does not depend on its split, the rate moves, and steps without finite numbers change nothing."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from server.basemodels.loading import load_causal_model
from server.childprocess import Signals
from server.domain.events import ChildEvent, Evaluated, StepDone, Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.specs import EarlyStopping, Objective, TrainingParameters
from server.domain.techniques import FullTechnique, LoraTechnique, Technique
from server.training.batches import BatchPlan, Examples, MicroBatch
from server.training.checkpoint import Position
from server.training.loop import MAX_SKIPPED_IN_A_ROW, train
from server.training.memory import settle_memory
from server.training.network import Network
from server.training.objectives.objective import TokenLosses, choose_objective
from server.training.objectives.reference import compute_reference
from server.training.objectives.supervised import Supervised
from server.training.optimiser import make_optimiser
from server.training.signals import PauseAsked, Stopped
from server.training.state import Run, Way
from server.training.techniques.apply import apply_technique
from tests.tiny_models import build_tiny_causal_model
from tests.training.building import make_parameters, make_sequences

# Of records, or of the two sequences of ten pairs.
LENGTHS = (40, 9, 23, 64, 5, 31, 17, 12, 28, 8, 33, 19, 7, 22, 14, 11, 26, 30, 18, 6)


@dataclass
class Trial:
    """A run with what it said and saved."""

    run: Run
    events: list[ChildEvent]
    saved: list[tuple[int, bool]]

    def train(self, position: Position | None = None) -> Position:
        position = position or Position()
        train(self.run, position)
        return position

    @property
    def steps(self) -> list[StepDone]:
        return [event for event in self.events if isinstance(event, StepDone)]


@dataclass
class Builder:
    """Makes trials that all start from the same weights. Ten records in steps of eight: the last window is a partial one."""

    directory: Path

    def build(
        self, settings: TrainingParameters, *, technique: Technique | None = None, held_out: int = 0, signals: Signals | None = None
    ) -> Trial:
        torch.manual_seed(0)
        model = load_causal_model(self.directory, dtype=torch.float32)
        trained = apply_technique(model, technique or LoraTechnique(rank=4, alpha=8.0), seed=1, total_steps=2)
        network = Network(trained.model, packing=settings.packing)
        records = make_sequences(LENGTHS, 2) if settings.objective.needs_pairs else make_sequences(LENGTHS[:10])
        objective = choose_objective(settings)
        examples, test = Examples(records), Examples(records.select(list(range(held_out))))
        if objective.needs_reference:
            examples, test = (compute_reference(network, part, 1024, lambda: None) for part in (examples, test))
        events: list[ChildEvent] = []
        saved: list[tuple[int, bool]] = []
        run = Run(
            network=network,
            trained=trained,
            objective=objective,
            optimiser=make_optimiser(trained.parameters.values(), settings),
            examples=examples,
            held_out=test,
            plan=BatchPlan.of(10, batch_size=settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps, seed=0),
            settings=settings,
            emit=events.append,
            signals=signals or Signals(lambda: False, lambda: False),
            save=lambda position, best: saved.append((position.step, best)),
            way=Way(settings.micro_batch_tokens or 1024, recomputes=False),
        )
        return Trial(run, events, saved)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(build_tiny_causal_model(tmp_path_factory.mktemp("base")))


def settings_of(**changes: object) -> TrainingParameters:
    return replace(make_parameters(), **{"batch_size": 8, "max_steps": None, **changes})  # type: ignore[arg-type]  # names are checked by replace


def compare(mine: Trial, theirs: Trial) -> None:
    """Demand the same steps and weights, up to the order in which floats were added."""
    for got, expected in zip(mine.steps, theirs.steps, strict=True):
        assert (got.step, got.tokens, got.trained_tokens) == (expected.step, expected.tokens, expected.trained_tokens)
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        assert got.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
    for name, parameter in mine.run.trained.parameters.items():
        torch.testing.assert_close(parameter, theirs.run.trained.parameters[name], rtol=1e-3, atol=1e-4)


def groups_of(trial: Trial, step: int) -> list[int]:
    run = trial.run
    return [len(group) for group in run.examples.split(run.plan.records_of_step(step), run.way.micro_batch_tokens)]


# Micro-batches of one record, of two or three, and whole steps.
@pytest.mark.parametrize("objective", list(Objective))
def test_loss_gradient_and_weights_do_not_depend_on_the_split_of_a_step(builder: Builder, objective: Objective) -> None:
    whole, halves, single = (builder.build(settings_of(objective=objective, micro_batch_tokens=size)) for size in (4096, 200, 1))
    assert [groups_of(trial, 0) for trial in (whole, single)] == [[8], [1] * 8]
    assert [groups_of(trial, 1) for trial in (whole, single)] == [[2], [1] * 2]
    assert 1 < len(groups_of(halves, 0)) < 8
    for trial in (whole, halves, single):
        trial.train()
    assert len(whole.steps) == 2
    compare(halves, whole)
    compare(single, whole)


def note_gradient(taken: dict[str, torch.Tensor], name: str, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    taken[name] = parameter.grad.clone()


def test_a_step_of_eight_is_two_of_four_or_eight_of_one(builder: Builder) -> None:
    """Gradients accumulate to the same update however the records of a step are windowed."""
    gradients = []
    for size in (4096, 160, 1):
        trial = builder.build(settings_of(micro_batch_tokens=size, max_gradient_norm=1e9))
        taken: dict[str, torch.Tensor] = {}
        for name, parameter in trial.run.trained.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(note_gradient, taken, name))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        trial.train()
        gradients.append(taken)
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("technique", [LoraTechnique(rank=4, alpha=8.0, dropout=0.2), FullTechnique()], ids=["lora", "full"])
def test_activations_that_are_computed_again_change_no_number(builder: Builder, technique: Technique) -> None:
    """Dropout included: what was drawn in the forward pass is drawn again."""
    kept = builder.build(settings_of(gradient_checkpointing=False), technique=technique)
    again = builder.build(settings_of(gradient_checkpointing=True), technique=technique)
    for trial in (kept, again):
        torch.manual_seed(3)
        settle_memory(trial.run)
        trial.train()
    assert [layer.gradient_checkpointing for layer in layers_of(again)] == [True, True]
    assert [layer.gradient_checkpointing for layer in layers_of(kept)] == [False, False]
    assert [step.loss for step in again.steps] == [step.loss for step in kept.steps]
    compare(again, kept)


def layers_of(trial: Trial) -> list[nn.Module]:
    return [module for module in trial.run.network.model.modules() if type(module).__name__ == "LlamaDecoderLayer"]


def test_records_computed_alone_give_the_same_training(builder: Builder) -> None:
    packed, alone = (builder.build(settings_of(packing=packing)) for packing in (True, False))
    assert packed.run.network.packed
    assert not alone.run.network.packed
    for trial in (packed, alone):
        trial.train()
    compare(alone, packed)


def test_the_same_seed_repeats_a_run_bit_for_bit(builder: Builder) -> None:
    technique = LoraTechnique(rank=4, alpha=8.0, dropout=0.2)
    first, second = (builder.build(settings_of(), technique=technique) for _ in range(2))
    for trial in (first, second):
        torch.manual_seed(3)
        trial.train()
    assert [(step.loss, step.gradient_norm) for step in first.steps] == [(step.loss, step.gradient_norm) for step in second.steps]
    parameters = second.run.trained.parameters
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in first.run.trained.parameters.items())


def test_the_optimiser_follows_the_schedule(builder: Builder) -> None:
    trial = builder.build(settings_of())
    trial.train()
    rates = [event.learning_rate for event in trial.steps]
    assert rates == [pytest.approx(0.005), pytest.approx(0.01)]
    assert trial.run.optimiser.param_groups[0]["lr"] == rates[-1]


def test_gradients_are_clipped_to_their_norm_and_the_log_tells_what_it_was(builder: Builder) -> None:
    """One step of plain gradient descent moves the weights by the rate times the clipped gradient."""
    trial = builder.build(settings_of(max_gradient_norm=1e-3, batch_size=10))
    parameters = trial.run.trained.parameters
    trial.run.optimiser = torch.optim.SGD(parameters.values(), lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trial.train()
    (step,) = trial.steps
    moved = math.sqrt(sum(float((parameter.detach() - before[name]).square().sum()) for name, parameter in parameters.items()))
    assert step.gradient_norm > 0.01
    assert moved == pytest.approx(step.learning_rate * 1e-3, rel=1e-2)


def test_a_step_without_a_finite_gradient_leaves_the_weights_and_is_no_step_of_the_log(builder: Builder) -> None:
    trial = builder.build(settings_of())
    parameters = trial.run.trained.parameters
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    broken = next(parameter for name, parameter in parameters.items() if "lora_A" in name)
    broken.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    position = trial.train()
    assert [type(event) for event in trial.events] == [Warned, Warned]
    assert (position.step, position.skipped_in_a_row) == (2, 2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def test_too_many_such_steps_in_a_row_fail_the_job(builder: Builder) -> None:
    trial = builder.build(settings_of())
    next(iter(trial.run.trained.parameters.values())).register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with pytest.raises(JobFailure) as failure:
        trial.train(Position(skipped_in_a_row=MAX_SKIPPED_IN_A_ROW))
    assert failure.value.reason is FailureReason.LOSS_NOT_FINITE


class Once:
    """Says yes at its n-th call and ever after."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def __call__(self) -> bool:
        self._left -= 1
        return self._left <= 0


@pytest.mark.parametrize("calls", [1, 2, 4, 6])
def test_a_pause_saves_before_the_next_step_and_cuts_evaluations_short_without_a_word(builder: Builder, calls: int) -> None:
    """Wherever it comes, what is logged before it and after it is what a run without it logs."""
    settings = settings_of(max_steps=None, epochs=2.4, evaluate_every_steps=1, micro_batch_tokens=64)
    whole = builder.build(settings, held_out=3)
    whole.train()
    paused = builder.build(settings, held_out=3, signals=Signals(lambda: False, Once(calls)))
    position = Position()
    with pytest.raises(PauseAsked):
        paused.train(position)
    assert paused.saved[-1] == (position.step, False)
    paused.run.signals = Signals(lambda: False, lambda: False)
    paused.train(position)
    numbers = [(type(event), event.step, event.loss) for event in whole.events if isinstance(event, StepDone | Evaluated)]
    assert [(type(event), event.step, event.loss) for event in paused.events if isinstance(event, StepDone | Evaluated)] == numbers


@pytest.mark.parametrize("calls", [1, 3])
def test_a_stop_takes_effect_between_micro_batches_and_saves_nothing(builder: Builder, calls: int) -> None:
    trial = builder.build(settings_of(micro_batch_tokens=1), signals=Signals(Once(calls), lambda: False))
    with pytest.raises(Stopped):
        trial.train()
    assert trial.saved == []
    assert trial.steps == []


class Scripted:
    """Evaluations that come out as they are listed, step 0 first; training is as ever."""

    needs_reference: ClassVar[bool] = False

    def __init__(self, losses: list[float]) -> None:
        self._left = iter(losses)

    def count(self, batch: MicroBatch) -> float:
        return Supervised().count(batch)

    def sum_loss(self, network: TokenLosses, batch: MicroBatch) -> torch.Tensor:
        if torch.is_grad_enabled():
            return Supervised().sum_loss(network, batch)
        return torch.tensor(next(self._left) * self.count(batch))


def plan_evaluations(steps: int, stopping: EarlyStopping | None, keep_best: bool = True) -> TrainingParameters:
    settings = replace(make_parameters(), batch_size=1, max_steps=steps, evaluate_every_steps=1, checkpoint_every_steps=100)
    return replace(settings, early_stopping=stopping, keep_best=keep_best)


CURVE = [5.0, 4.0, 3.0, 3.2, 2.95, 3.1, 3.0, 3.3, 1.0]


@pytest.mark.parametrize(("patience", "min_delta", "last"), [(1, 0.0, 3), (2, 0.0, 6), (3, 0.0, 7), (2, 0.1, 4), (3, 0.1, 5), (8, 0.0, 8)])
def test_training_stops_after_evaluations_that_bring_nothing(builder: Builder, patience: int, min_delta: float, last: int) -> None:
    trial = builder.build(plan_evaluations(8, EarlyStopping(patience, min_delta)), held_out=2)
    trial.run.objective = Scripted(CURVE)
    position = trial.train()
    assert position.step == last
    assert trial.saved[-1][0] == last
    assert [event.code for event in trial.events if isinstance(event, Warned)] == ["STOPPED_EARLY"] * (last < 8)


def test_patience_goes_on_from_the_position_it_was_saved_with(builder: Builder) -> None:
    trial = builder.build(plan_evaluations(8, EarlyStopping(3)), held_out=2)
    trial.run.objective = Scripted(CURVE[6:])
    position = Position(
        step=5, evaluated_step=5, start_loss=5.0, best_loss=2.95, best_step=4, patience_loss=2.95, evaluations_without_improvement=1
    )
    assert trial.train(position).step == 7
    again = builder.build(plan_evaluations(8, EarlyStopping(3)), held_out=2)
    assert again.train(position).step == 7
    assert again.events == []


def test_a_checkpoint_is_saved_at_each_evaluation_that_is_the_best_of_the_trained_weights(builder: Builder) -> None:
    """The base model's own evaluation, the first here, is no trained weights'."""
    trial = builder.build(plan_evaluations(6, None), held_out=2)
    trial.run.objective = Scripted([1.0, 4.0, 3.0, 3.2, 2.9, math.nan, 3.0])
    position = trial.train()
    assert trial.saved == [(1, True), (2, True), (4, True), (6, False)]
    assert (position.best_step, position.start_loss) == (4, 1.0)
    assert position.best_loss == pytest.approx(2.9)
    assert [event.best for event in trial.events if isinstance(event, Evaluated)] == [False, True, True, False, True, False]
    other = builder.build(plan_evaluations(6, None, keep_best=False), held_out=2)
    other.run.objective = Scripted([1.0, 4.0, 3.0, 3.2, 2.9, math.nan, 3.0])
    other.train()
    assert other.saved == [(6, False)]


@pytest.mark.parametrize("objective", list(Objective))
def test_an_evaluation_is_the_objectives_own_mean_whatever_the_micro_batches(builder: Builder, objective: Objective) -> None:
    losses = []
    for size in (1, 4096):
        trial = builder.build(settings_of(objective=objective, micro_batch_tokens=size), held_out=10)
        trial.train()
        evaluated = [event for event in trial.events if isinstance(event, Evaluated)]
        assert [(event.step, event.records) for event in evaluated] == [(0, 10), (2, 10)]
        losses.append([event.loss for event in evaluated])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # All ten records in one step and no dropout: the first step's loss is the evaluation's.
    whole = builder.build(replace(settings_of(objective=objective), batch_size=10, warmup_steps=0), held_out=10)
    whole.train()
    first = next(event for event in whole.events if isinstance(event, Evaluated))
    assert whole.steps[0].loss == pytest.approx(first.loss, rel=1e-5)
