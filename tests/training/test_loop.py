"""The loop: a step's gradient does not depend on its split, the rate moves, and steps without finite numbers change nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.basemodels.loading import load_causal_model
from server.domain.events import ChildEvent, StepDone, Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.techniques import LoraTechnique
from server.training.adapters import add_lora, trainable_parameters
from server.training.batches import BatchPlan
from server.training.checkpoint import Position
from server.training.data import TokenizedRecords
from server.training.loop import MAX_SKIPPED_IN_A_ROW, Run, make_optimiser, train
from server.training.network import Network
from tests.tiny_models import build_tiny_causal_model
from tests.training.building import make_parameters

LENGTHS = (40, 9, 23, 64, 5, 31, 17, 12, 28, 8)


def make_run(directory: Path, micro_batch_tokens: int) -> tuple[Run, list[ChildEvent]]:
    """Ten records in steps of eight: the second and last step is a partial one."""
    network = Network(
        add_lora(load_causal_model(build_tiny_causal_model(directory), dtype=torch.float32), LoraTechnique(rank=4, alpha=8.0), seed=1)
    )
    records = TokenizedRecords()
    for length in LENGTHS:
        # Few trained tokens in some, many in others: a mean of means would be something else.
        records.append([(7 * place + length) % 300 for place in range(length)], tuple(place > 3 * (length % 5) for place in range(length)))
    settings = replace(make_parameters(), batch_size=8, max_steps=None)
    parameters = trainable_parameters(network.model)
    events: list[ChildEvent] = []
    run = Run(
        network=network,
        parameters=parameters,
        optimiser=make_optimiser(parameters.values(), settings),
        records=records,
        held_out=TokenizedRecords(),
        plan=BatchPlan.of(len(records), batch_size=8, epochs=1.0, max_steps=None, seed=0),
        settings=settings,
        emit=events.append,
        should_stop=lambda: False,
        save=lambda position: None,
        micro_batch_tokens=micro_batch_tokens,
    )
    return run, events


@pytest.mark.parametrize("micro_batch_tokens", [1, 64, 128])
def test_loss_gradient_and_weights_do_not_depend_on_the_split_of_a_step(tmp_path: Path, micro_batch_tokens: int) -> None:
    whole, expected = make_run(tmp_path / "whole", 1 << 20)
    parts, got = make_run(tmp_path / "parts", micro_batch_tokens)
    train(whole, Position())
    train(parts, Position())
    for mine, theirs in zip(got, expected, strict=True):
        assert isinstance(mine, StepDone)
        assert isinstance(theirs, StepDone)
        assert (mine.step, mine.tokens, mine.trained_tokens) == (theirs.step, theirs.tokens, theirs.trained_tokens)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-4)
    for name, parameter in parts.parameters.items():
        torch.testing.assert_close(parameter, whole.parameters[name], rtol=1e-3, atol=1e-4)


def test_the_optimiser_follows_the_schedule(tmp_path: Path) -> None:
    run, events = make_run(tmp_path, 1024)
    train(run, Position())
    rates = [event.learning_rate for event in events if isinstance(event, StepDone)]
    assert rates == [pytest.approx(0.005), pytest.approx(0.01)]
    assert run.optimiser.param_groups[0]["lr"] == rates[-1]


def test_a_step_without_a_finite_gradient_leaves_the_weights_and_is_no_step_of_the_log(tmp_path: Path) -> None:
    run, events = make_run(tmp_path, 1024)
    before = {name: parameter.clone() for name, parameter in run.parameters.items()}
    broken = next(parameter for name, parameter in run.parameters.items() if "lora_A" in name)
    broken.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    position = Position()
    train(run, position)
    assert [type(event) for event in events] == [Warned, Warned]
    assert (position.step, position.skipped_in_a_row) == (2, 2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.parameters.items())


def test_too_many_such_steps_in_a_row_fail_the_job(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, 1024)
    next(iter(run.parameters.values())).register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with pytest.raises(JobFailure) as failure:
        train(run, Position(skipped_in_a_row=MAX_SKIPPED_IN_A_ROW))
    assert failure.value.reason is FailureReason.LOSS_NOT_FINITE
