"""A whole fine-tuning on a tiny model: exact resume, stopping, failures with reasons, and a result that was tried."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from server.basemodels.loading import load_causal_model, preferred_dtype
from server.domain.events import CheckpointSaved, ChildEvent, DataChecked, Evaluated, Finalizing, ResultReady, Started, StepDone, Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.techniques import LoraTechnique
from server.storage.artefacts import MANIFEST_NAME
from server.training.artefact import WEIGHTS_NAME, try_result
from tests.tiny_models import CHATML, FAMILIES
from tests.training.building import Workplace, describe_dataset, make_records

E = TypeVar("E", bound=ChildEvent)


def of(events: Sequence[ChildEvent], kind: type[E]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def what_was_computed(step: StepDone) -> tuple[object, ...]:
    return (step.step, step.epoch, step.loss, step.learning_rate, step.gradient_norm, step.tokens, step.trained_tokens)


class Killed(BaseException):
    """Stands for kill -9: nothing of the trainer's runs after it."""


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace.build(tmp_path)


def test_the_events_come_in_order_and_end_with_a_result(workplace: Workplace) -> None:
    events = workplace.train()
    said = [type(event) for event in events]
    assert said.index(DataChecked) < said.index(Started) < said.index(StepDone)
    (started,) = of(events, Started)
    assert (started.total_steps, started.train_records, started.eval_records) == (6, 16, 4)
    assert [step.step for step in of(events, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert [evaluated.step for evaluated in of(events, Evaluated)] == [0, 3, 6]
    assert [saved.step for saved in of(events, CheckpointSaved)] == [2, 4, 6]
    assert isinstance(events[-2], Finalizing)
    assert isinstance(events[-1], ResultReady)
    evaluations = of(events, Evaluated)
    assert evaluations[-1].loss < evaluations[0].loss
    assert events[-1].metrics["best_eval_loss"] == min(evaluated.loss for evaluated in evaluations)


@pytest.mark.parametrize("killed_after", [2, 3, 5])
def test_a_job_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, killed_after: int) -> None:
    whole = Workplace.build(tmp_path / "whole")
    expected = whole.train()
    broken = Workplace.build(tmp_path / "broken")
    # The same base model by the same path, so that both jobs have one identity.
    broken.order = replace(broken.order, spec=whole.order.spec)
    broken.root.joinpath("models").rename(broken.root / "unused")
    broken.root.joinpath("models").symlink_to(whole.root / "models")
    seen: list[ChildEvent] = []

    def kill(event: ChildEvent) -> None:
        seen.append(event)
        if isinstance(event, StepDone) and event.step == killed_after:
            raise Killed

    with pytest.raises(Killed):
        broken.train(emit=kill)
    saved = of(seen, CheckpointSaved)
    torch.manual_seed(12345)  # another process has another random state
    broken.order = replace(broken.order, lease_epoch=2, checkpoint_path=saved[-1].path if saved else None)
    resumed = broken.train()
    (started,) = of(resumed, Started)
    assert started.resumed_from_step == (saved[-1].step if saved else 0)
    logged = [what_was_computed(step) for step in of(seen, StepDone)]
    again = [what_was_computed(step) for step in of(resumed, StepDone)]
    assert logged[: started.resumed_from_step] + again == [what_was_computed(step) for step in of(expected, StepDone)]
    results = [place.store.open(place.order.artifact_path).directory / WEIGHTS_NAME for place in (whole, broken)]
    first, second = (load_file(path) for path in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    last = [
        load_file(place.store.locate(f"default/jobs/job_1/checkpoint-6-{epoch}") / "state.safetensors")
        for place, epoch in ((whole, 1), (broken, 2))
    ]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_a_checkpoint_of_another_specification_is_refused(workplace: Workplace) -> None:
    saved = of(workplace.train(), CheckpointSaved)
    workplace.order = replace(workplace.order, checkpoint_path=saved[0].path)
    workplace.change(learning_rate=0.5)
    with pytest.raises(JobFailure, match="belongs to something else") as failure:
        workplace.train()
    assert failure.value.reason is FailureReason.ARTIFACT_INVALID


def test_stopping_takes_effect_within_a_step_and_leaves_no_result(workplace: Workplace) -> None:
    stop = False

    def stop_after_two(event: ChildEvent) -> None:
        nonlocal stop
        stop = stop or (isinstance(event, StepDone) and event.step == 2)

    events = workplace.train(should_stop=lambda: stop, emit=stop_after_two)
    assert [step.step for step in of(events, StepDone)] == [1, 2]
    assert of(events, ResultReady) == []
    assert not workplace.store.locate(workplace.order.artifact_path).exists()
    assert not list(workplace.root.rglob("*.partial"))


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_trained_loaded_back_and_learns(tmp_path: Path, family: str, chat_template: bool) -> None:
    workplace = Workplace.build(tmp_path, family=family, chat_template=chat_template)
    events = workplace.train()
    evaluations = of(events, Evaluated)
    assert evaluations[-1].loss < evaluations[0].loss
    (result,) = of(events, ResultReady)
    assert result.metrics["effect_largest_logit_difference"] > 0


def test_plain_peft_loads_the_result_and_answers_otherwise_than_the_base(workplace: Workplace) -> None:
    workplace.train()
    base_directory = workplace.root / "models" / "llama"
    base = load_causal_model(base_directory, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, str(workplace.store.open(workplace.order.artifact_path).directory))
        assert not torch.equal(before, adapted(input_ids=ids).logits)


def test_the_manifest_ties_the_result_to_its_base_template_and_tokens(workplace: Workplace) -> None:
    (result,) = of(workplace.train(), ResultReady)
    artefact = workplace.store.open(workplace.order.artifact_path, result.manifest_sha256)
    described = artefact.description
    assert described["base_model"] == workplace.order.spec.base_model
    assert described["base_revision"] == result.base_revision
    assert described["stop_token_ids"]
    assert described["golden_token_ids"]
    assert set(artefact.files) >= {WEIGHTS_NAME, "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert artefact.size_bytes == result.size_bytes


def rewrite_weights(workplace: Workplace, change: str) -> None:
    path = workplace.store.locate(workplace.order.artifact_path) / WEIGHTS_NAME
    tensors = load_file(path)
    if change == "without effect":
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    elif change == "unknown name":
        first = sorted(tensors)[0]
        tensors[first.replace("layers.0", "layers.9")] = tensors.pop(first)
    else:
        tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


@pytest.mark.parametrize("change", ["without effect", "unknown name", "missing tensor"])
def test_a_result_that_would_be_ignored_when_served_is_refused(workplace: Workplace, change: str) -> None:
    workplace.train()
    artefact = workplace.store.open(workplace.order.artifact_path)
    rewrite_weights(workplace, change)
    with pytest.raises(JobFailure) as failure:
        try_result(artefact, workplace.root / "models" / "llama", preferred_dtype(), torch.device("cpu"))
    assert failure.value.reason is FailureReason.ARTIFACT_INVALID


def test_a_result_with_another_template_is_refused(workplace: Workplace) -> None:
    workplace.train()
    artefact = workplace.store.open(workplace.order.artifact_path)
    (artefact.directory / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(JobFailure, match="token ids"):
        try_result(artefact, workplace.root / "models" / "llama", preferred_dtype(), torch.device("cpu"))


def test_a_loss_that_is_no_number_is_skipped_and_then_fails_the_job(workplace: Workplace) -> None:
    weights = workplace.root / "models" / "llama" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    events: list[ChildEvent] = []
    with pytest.raises(JobFailure) as failure:
        workplace.train(emit=events.append)
    assert failure.value.reason is FailureReason.LOSS_NOT_FINITE
    assert of(events, StepDone) == []
    assert {warned.code for warned in of(events, Warned)} == {"LOSS_NOT_FINITE"}


def test_an_unknown_or_unsafe_base_model_fails_with_its_reason_and_no_path(workplace: Workplace) -> None:
    (workplace.root / "models" / "llama" / "model.safetensors").unlink()
    for base_model in (str(workplace.root / "models" / "llama"), "no/such-model", "/etc"):
        workplace.order = replace(workplace.order, spec=replace(workplace.order.spec, base_model=base_model))
        with pytest.raises(JobFailure) as failure:
            workplace.train()
        assert failure.value.reason is FailureReason.BASE_MODEL_UNAVAILABLE
        assert str(workplace.root) not in failure.value.message.replace(base_model, "")


def test_a_separate_evaluation_set_is_used_whole(workplace: Workplace) -> None:
    path = workplace.root / "storage" / "default/datasets/ds_2.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in make_records(7)))
    workplace.order = replace(workplace.order, eval_dataset=describe_dataset("ds_2"))
    (started,) = of(workplace.train(), Started)
    assert (started.train_records, started.eval_records) == (20, 7)


def test_only_the_named_layers_are_trained(workplace: Workplace) -> None:
    technique = LoraTechnique(rank=2, target_modules=("q_proj", "v_proj"))
    workplace.order = replace(workplace.order, spec=replace(workplace.order.spec, technique=technique))
    workplace.train()
    artefact = workplace.store.open(workplace.order.artifact_path)
    names = load_file(artefact.directory / WEIGHTS_NAME)
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}
    assert (artefact.directory / MANIFEST_NAME).exists()
