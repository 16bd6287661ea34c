"""The estimate before a start: grows with what costs, knows what would make a job fit, and refuses only what cannot."""

from dataclasses import replace

import pytest

from server.domain.base_models import BaseModel
from server.domain.catalogue import find_base_model
from server.domain.errors import FailedPrecondition
from server.domain.estimates import Estimate, Range, Verdict
from server.domain.specs import EarlyStopping, FineTuneSpec, ParametersRequest, TrainingParameters
from server.domain.techniques import FullTechnique, LoraTechnique, PrefixTuning, QloraTechnique, Technique
from server.services.estimating import SeenSpeed, estimate_fine_tune, refuse_if_too_big
from server.services.machine import Machine
from server.services.memory_model import count_trained, estimate_memory
from server.services.record_lengths import RecordLengths
from server.services.training_parameters import FineTuneDefaults, resolve_parameters

GIB = 1 << 30
LAPTOP = Machine(memory_bytes=16 * GIB, device_memory_bytes=0, cores=2)
H200 = Machine(memory_bytes=128 * GIB, device_memory_bytes=141 * 10**9, cores=16)
LENGTHS = RecordLengths(Range(150_000, 200_000, 250_000), longest=800)


def find(name: str) -> BaseModel:
    model = find_base_model(name)
    assert model is not None
    return model


def parameters(technique: Technique, asked: ParametersRequest | None = None) -> TrainingParameters:
    return resolve_parameters(asked or ParametersRequest(), FineTuneDefaults(16, None), technique, 1_000)


def estimate(name: str, technique: Technique, machine: Machine = LAPTOP, speeds: tuple[SeenSpeed, ...] = ()) -> Estimate:
    spec = FineTuneSpec(find(name).base_model_id, "ds_1", "0" * 64, technique, parameters(technique))
    return estimate_fine_tune(spec, find(name).shape, 1_000, LENGTHS, machine, speeds)


def memory(found: Estimate) -> float:
    figure = found.device_memory_bytes or found.memory_bytes
    assert figure is not None
    return figure.expected


def test_each_figure_is_given_with_how_far_it_may_be_off() -> None:
    found = estimate("smollm2", LoraTechnique())
    for figure in (found.memory_bytes, found.disk_bytes, found.steps, found.tokens, found.duration_seconds):
        assert figure is not None
        assert 0 < figure.low <= figure.expected <= figure.high
    assert found.verdict is Verdict.FITS
    assert found.device_memory_bytes is None
    assert found.steps == Range(188, 188, 188)
    assert found.tokens == Range(450_000, 600_000, 750_000)


def test_lora_trains_as_many_parameters_as_peft_says() -> None:
    # peft 0.21 prints 4,884,480 of 139,399,488 for rank 16 on all linear layers of SmolLM2-135M.
    assert count_trained(find("smollm2").shape, LoraTechnique()) == 4_884_480
    assert count_trained(find("smollm2").shape, FullTechnique()) == 134_515_008
    assert count_trained(find("llama-2-7b").shape, PrefixTuning(20)) == 20 * 2 * 32 * 4096


def test_what_costs_more_is_expected_to() -> None:
    assert memory(estimate("smollm2", FullTechnique())) > memory(estimate("smollm2", LoraTechnique()))
    assert memory(estimate("llama-3.2-1b", QloraTechnique())) < memory(estimate("llama-3.2-1b", LoraTechnique()))
    technique = LoraTechnique()
    shape, usual = find("smollm2").shape, parameters(technique)
    long = estimate_memory(shape, technique, usual, 2_048).total
    assert long > estimate_memory(shape, technique, usual, 256).total
    assert long > estimate_memory(shape, technique, replace(usual, gradient_checkpointing=True), 2_048).total


@pytest.mark.parametrize(
    ("name", "technique", "fits"),
    [
        ("llama-3.1-70b", QloraTechnique(), True),
        ("llama-3.1-70b", FullTechnique(), False),
        ("falcon-40b", LoraTechnique(), True),
        ("llama-2-70b", QloraTechnique(), True),
        ("falcon-40b", QloraTechnique(), True),
        ("llama-3-8b", LoraTechnique(), True),
    ],
)
def test_the_big_ones_are_judged_by_their_published_configurations(name: str, technique: Technique, fits: bool) -> None:
    assert (estimate(name, technique, H200).verdict is Verdict.FITS) == fits


def test_what_would_fit_with_a_change_is_refused_with_that_change() -> None:
    found = estimate("llama-2-13b", FullTechnique(), H200)
    assert found.verdict is Verdict.FITS_WITH
    with pytest.raises(FailedPrecondition, match="technique lora") as refusal:
        refuse_if_too_big(found)
    assert refusal.value.reason == "DOES_NOT_FIT"
    assert "fits" in refusal.value.data.metadata["suggestion"]


def test_what_no_change_makes_fit_says_so() -> None:
    found = estimate("llama-2-70b", LoraTechnique())
    assert found.verdict is Verdict.DOES_NOT_FIT
    with pytest.raises(FailedPrecondition, match="smaller base model"):
        refuse_if_too_big(found)


def test_the_speed_that_was_seen_here_beats_the_guess() -> None:
    seen = SeenSpeed(find("smollm2").base_model_id, "lora", 1_000.0, None)
    found = estimate("smollm2", LoraTechnique(), speeds=(seen,))
    assert found.duration_seconds is not None
    assert found.duration_seconds.expected == pytest.approx(600 + 15.8, abs=1)
    other = SeenSpeed("other", "lora", 100.0, 1e12)
    by_arithmetic = estimate("smollm2", LoraTechnique(), speeds=(other,)).duration_seconds
    assert by_arithmetic is not None
    assert by_arithmetic.expected == pytest.approx(600_000 * 4 * find("smollm2").shape.matrix_weights / 1e12 + 15.8, rel=0.01)


def test_early_stopping_may_end_it_sooner() -> None:
    spec = FineTuneSpec("b", "ds_1", "", LoraTechnique(), replace(parameters(LoraTechnique()), early_stopping=EarlyStopping()))
    found = estimate_fine_tune(spec, find("smollm2").shape, 1_000, LENGTHS, LAPTOP, ())
    assert found.steps == Range(1, 188, 188)
