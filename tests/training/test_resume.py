"""A job that is killed, paused or moved goes on bit for bit, whatever it trains by and for; its result is of the best weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file

from server.domain.datasets import RecordKind
from server.domain.events import CheckpointSaved, ChildEvent, Evaluated, Paused, ResultReady, Sampled, Started, StepDone, Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.specs import EarlyStopping, Objective, Scheduler
from server.domain.techniques import AdaLora, FullTechnique, LoraTechnique, PrefixTuning, QloraTechnique, Technique
from server.training.artefact import WEIGHTS_NAME
from tests.tiny_models import build_tiny_causal_model
from tests.training.building import Workplace, make_pairs, write_records
from tests.training.dying import kill_after

E = TypeVar("E", bound=ChildEvent)
# A rate at which the second step undoes what the first has learnt: 6.06, 5.75, 6.07.
BREAKING: dict[str, Any] = {"learning_rate": 0.1, "scheduler": Scheduler.CONSTANT, "evaluate_every_steps": 1, "keep_best": True}
LORA = LoraTechnique(rank=4, alpha=8.0, dropout=0.2)


def of(events: Sequence[ChildEvent], kind: type[E]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def what_was_computed(events: Sequence[ChildEvent]) -> list[tuple[object, ...]]:
    return [
        (event.step, event.loss, event.learning_rate, event.gradient_norm, event.tokens, event.trained_tokens)
        for event in events
        if isinstance(event, StepDone)
    ]


def evaluations(events: Sequence[ChildEvent]) -> list[tuple[int, float]]:
    return [(event.step, event.loss) for event in of(events, Evaluated)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base model for all workplaces: by its path a job knows it."""
    root = tmp_path_factory.mktemp("models")
    build_tiny_causal_model(root / "llama")
    return root


def make_workplace(root: Path, models: Path, technique: Technique = LORA, **parameters: object) -> Workplace:
    workplace = Workplace.build(root, models=models)
    workplace.order = replace(workplace.order, spec=replace(workplace.order.spec, technique=technique))
    workplace.change(**{"max_steps": 10, "checkpoint_every_steps": 5, "evaluate_every_steps": 5, **parameters})
    if workplace.order.spec.parameters.objective.needs_pairs:
        write_records(root / "storage" / workplace.order.dataset.path, make_pairs(20))
        workplace.order = replace(workplace.order, dataset=replace(workplace.order.dataset, record_kind=RecordKind.PREFERENCE))
    return workplace


def state_of(workplace: Workplace, name: str) -> dict[str, torch.Tensor]:
    return load_file(workplace.store.locate(f"default/jobs/job_1/{name}") / "state.safetensors")


CASES: dict[str, tuple[Technique, Objective]] = {
    "lora": (LORA, Objective.SUPERVISED),
    "lora-dpo": (LORA, Objective.DPO),
    "lora-orpo": (LORA, Objective.ORPO),
    "qlora-dpo": (QloraTechnique(LORA), Objective.DPO),
    "full-orpo": (FullTechnique(), Objective.ORPO),
    "adalora": (AdaLora(initial_rank=6, target_rank=3), Objective.SUPERVISED),
    "prefix-dpo": (PrefixTuning(virtual_tokens=4), Objective.DPO),
}


def is_step(event: ChildEvent, step: int) -> bool:
    return isinstance(event, StepDone) and event.step == step


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_five_a_kill_and_five_more(tmp_path: Path, models: Path, name: str) -> None:
    """Weights, optimiser, random state, schedule and data order, with dropout on: bit for bit."""
    technique, objective = CASES[name]
    whole = make_workplace(tmp_path / "whole", models, technique, objective=objective)
    expected = whole.train()
    broken = make_workplace(tmp_path / "broken", models, technique, objective=objective)
    assert kill_after(7, broken) == ["checkpoint-5-1"]
    torch.manual_seed(12345)  # another process has another random state
    broken.order = replace(broken.order, lease_epoch=2, checkpoint_path="default/jobs/job_1/checkpoint-5-1")
    resumed = broken.train()
    assert of(resumed, Started)[0].resumed_from_step == 5
    assert what_was_computed(resumed) == what_was_computed(expected)[5:]
    assert evaluations(resumed) == evaluations(expected)[2:]
    first, second = state_of(whole, "checkpoint-10-1"), state_of(broken, "checkpoint-10-2")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_pause_saves_and_the_job_goes_on_as_if_there_had_been_none(tmp_path: Path, models: Path) -> None:
    whole = make_workplace(tmp_path / "whole", models)
    expected = whole.train()
    paused = make_workplace(tmp_path / "paused", models)
    asked: list[bool] = []
    events = paused.train(should_pause=lambda: bool(asked), emit=lambda event: asked.append(True) if is_step(event, 3) else None)
    assert isinstance(events[-1], Paused)
    assert isinstance(events[-2], CheckpointSaved)
    assert events[-2].step == 3
    assert of(events, ResultReady) == []
    paused.order = replace(paused.order, lease_epoch=2, checkpoint_path=events[-2].path)
    resumed = paused.train()
    assert what_was_computed(events) + what_was_computed(resumed) == what_was_computed(expected)
    assert evaluations(events) + evaluations(resumed) == evaluations(expected)


def test_a_pause_while_preparing_saves_nothing_and_says_so(tmp_path: Path, models: Path) -> None:
    workplace = make_workplace(tmp_path, models)
    events = workplace.train(should_pause=lambda: True)
    assert [type(event) for event in events if isinstance(event, Paused | CheckpointSaved | Started)] == [Paused]


def test_the_result_is_made_of_the_best_weights_and_says_of_which_step(tmp_path: Path, models: Path) -> None:
    workplace = make_workplace(tmp_path, models, **BREAKING, max_steps=2)
    events = workplace.train()
    trained = {step: loss for step, loss in evaluations(events) if step > 0}
    best = min(trained, key=lambda step: trained[step])
    assert best < 2
    (result,) = of(events, ResultReady)
    assert result.checkpoint_step == best
    assert result.metrics["best_eval_loss"] == trained[best]
    kept = [saved for saved in of(events, CheckpointSaved) if saved.best]
    assert kept[-1].step == best
    tensors = load_file(workplace.store.open(workplace.order.artifact_path).directory / WEIGHTS_NAME)
    state = load_file(workplace.store.locate(kept[-1].path) / "state.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state["parameter/" + name.replace(".weight", ".default.weight")])
    last = of(events, CheckpointSaved)[-1]
    # After a restart the order says where the best ones lie; and a loss of them does not lose the job.
    workplace.order = replace(workplace.order, lease_epoch=2, checkpoint_path=last.path, best_checkpoint_path=kept[-1].path)
    assert of(workplace.train(), ResultReady)[0].checkpoint_step == best
    workplace.order = replace(workplace.order, best_checkpoint_path=None)
    again = workplace.train()
    assert [warned.code for warned in of(again, Warned)] == ["BEST_CHECKPOINT_LOST"]
    assert of(again, ResultReady)[0].checkpoint_step == 2


def test_a_job_that_stops_early_has_a_result_of_its_best_weights(tmp_path: Path, models: Path) -> None:
    workplace = make_workplace(tmp_path, models, **BREAKING, max_steps=30, early_stopping=EarlyStopping(1))
    events = workplace.train()
    last = of(events, StepDone)[-1].step
    assert last < 30
    assert "STOPPED_EARLY" in [warned.code for warned in of(events, Warned)]
    (result,) = of(events, ResultReady)
    assert result.checkpoint_step == result.metrics["best_eval_step"] < last


def test_prompts_are_answered_at_each_evaluation_and_change_nothing(tmp_path: Path, models: Path) -> None:
    silent = make_workplace(tmp_path / "silent", models).train()
    prompts = ("Who keeps the maps?", "Hello")
    workplace = make_workplace(tmp_path / "asked", models, sample_prompts=prompts, sample_tokens=5)
    events = workplace.train()
    samples = of(events, Sampled)
    assert [(sample.step, sample.prompt) for sample in samples] == [(step, prompt) for step in (0, 5, 10) for prompt in prompts]
    assert what_was_computed(events) == what_was_computed(silent)
    assert samples[-2].text != samples[0].text
    assert all(sample.text for sample in samples)


def test_a_prompt_without_room_is_left_out_with_a_warning(tmp_path: Path, models: Path) -> None:
    workplace = make_workplace(tmp_path, models, sample_prompts=("Who? " * 400,), max_steps=1)
    events = workplace.train()
    assert of(events, Sampled) == []
    assert "SAMPLE_PROMPT_REFUSED" in [warned.code for warned in of(events, Warned)]


def test_another_job_starts_from_a_versions_weights_and_only_from_the_sealed_ones(tmp_path: Path, models: Path) -> None:
    workplace = make_workplace(tmp_path, models)
    events = workplace.train()
    (result,) = of(events, ResultReady)
    workplace.order = replace(
        workplace.order,
        job_id="job_2",
        artifact_path="default/models/mdl_1/job_2-1",
        warm_start_path=result.artifact_path,
        warm_start_manifest_sha256=result.manifest_sha256,
    )
    assert evaluations(workplace.train())[0][1] == pytest.approx(evaluations(events)[-1][1], rel=1e-3)
    workplace.order = replace(workplace.order, warm_start_manifest_sha256="0" * 64)
    with pytest.raises(JobFailure) as failure:
        workplace.train()
    assert failure.value.reason is FailureReason.ARTIFACT_INVALID


@pytest.mark.parametrize("technique", [LoraTechnique(rank=4, alpha=8.0), FullTechnique()])
def test_an_adapter_is_no_start_on_a_base_that_has_changed_and_a_whole_model_is(technique: Technique, tmp_path: Path) -> None:
    build_tiny_causal_model(tmp_path / "models" / "llama")
    workplace = make_workplace(tmp_path, tmp_path / "models", technique, max_steps=1, learning_rate=1e-3)
    (result,) = of(workplace.train(), ResultReady)
    workplace.order = replace(
        workplace.order,
        artifact_path="default/models/mdl_1/job_2-1",
        warm_start_path=result.artifact_path,
        warm_start_manifest_sha256=result.manifest_sha256,
    )
    config = Path(workplace.order.spec.base_model) / "config.json"
    config.write_text(config.read_text() + "\n")
    if isinstance(technique, FullTechnique):
        assert of(workplace.train(), ResultReady)
        return
    with pytest.raises(JobFailure, match="not what it was") as failure:
        workplace.train()
    assert failure.value.reason is FailureReason.BASE_MODEL_UNAVAILABLE


def test_a_result_tells_what_was_measured_and_made_of_what(tmp_path: Path, models: Path) -> None:
    events = make_workplace(tmp_path, models).train()
    (result,) = of(events, ResultReady)
    steps = of(events, StepDone)
    assert result.metrics["train_loss"] == steps[-1].loss
    assert result.metrics["tokens"] == steps[-1].tokens
    assert result.metrics["trained_tokens"] == sum(step.trained_tokens for step in steps)
    assert result.metrics["start_eval_loss"] == evaluations(events)[0][1]
    assert result.peak_memory_bytes > 1 << 27
    assert result.library_versions["torch"] == torch.__version__
    assert len(result.template_sha256) == 64
