"""The card tells the facts, in a form that the hub's own reader takes, and the same facts give the same text."""

from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from server.domain.specs import FineTuneSpec, LossOn, OverlongPolicy, Scheduler, TrainingParameters, VersionReference
from server.domain.techniques import FullTechnique, LoraTechnique, PrefixTuning, QloraTechnique
from server.training.card import CARD_FACTS, CardFacts, CardForm, write_model_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PARAMETERS = TrainingParameters(
    epochs=3.0, max_steps=None, batch_size=16, learning_rate=1e-3, scheduler=Scheduler.COSINE, warmup_steps=2, weight_decay=0.0,
    max_gradient_norm=1.0, max_sequence_tokens=2048, overlong_policy=OverlongPolicy.REJECT, loss_on=LossOn.ASSISTANT, seed=7,
    evaluate_every_steps=5, checkpoint_every_steps=5, sample_prompts=("a secret prompt",),
)  # fmt: skip
FACTS = CardFacts(
    form=CardForm.ADAPTER,
    spec=FineTuneSpec("meta-llama/Llama-2-7b-hf", "ds_1", "ab" * 32, LoraTechnique(rank=4), PARAMETERS),
    job_id="job_1",
    base_revision=COMMIT,
    checkpoint_step=15,
    train_records=1200,
    eval_records=30,
    metrics={"eval_loss": 1.2345678},
    library_versions={"torch": "2.13.0"},
    template_sha256="cd" * 32,
)


def front_matter(card: str) -> dict[str, Any]:
    """Read the card as the hub does."""
    data: Any = ModelCard(card).data
    return dict(data.to_dict())


def test_the_hubs_reader_takes_the_front_matter() -> None:
    data = front_matter(write_model_card(FACTS))
    assert data["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["license"] == "llama2"
    assert data["tags"] == ["lora", "supervised"]


def test_a_base_model_outside_the_catalogue_claims_no_licence_and_its_name_cannot_break_the_form() -> None:
    odd = '/models/it\'s: "odd" #1 | name'
    text = write_model_card(replace(FACTS, spec=replace(FACTS.spec, base_model=odd)))
    data = front_matter(text)
    assert data["base_model"] == odd
    assert "license" not in data


def test_data_configuration_metrics_and_libraries_are_told() -> None:
    text = write_model_card(replace(FACTS, spec=replace(FACTS.spec, warm_start_from=VersionReference("mdl_0", 3))))
    for told in (
        f"| SHA-256 of its bytes | {'ab' * 32} |", "| records trained on | 1,200 |", "| technique.rank | 4 |", "| learning_rate | 0.001 |",
        "| eval_loss | 1.23457 |", "| torch | 2.13.0 |", f'revision="{COMMIT}"', "optimiser step 15", "job_1", "mdl_0 version 3", "cd" * 32,
    ):  # fmt: skip
        assert told in text
    assert "a secret prompt" not in text


@pytest.mark.parametrize("form", [CardForm.MODEL, CardForm.MERGED])
def test_a_whole_model_is_loaded_by_transformers_alone(form: CardForm) -> None:
    text = write_model_card(replace(FACTS, form=form, spec=replace(FACTS.spec, technique=FullTechnique())))
    assert front_matter(text)["library_name"] == "transformers"
    assert "from peft" not in text


def test_limits_name_what_a_reader_must_know() -> None:
    quantised = write_model_card(replace(FACTS, eval_records=0, spec=replace(FACTS.spec, technique=QloraTechnique())))
    assert "in 4 bits (NF4, doubly quantised)" in quantised
    assert "No records were held out" in quantised
    prefixed = write_model_card(replace(FACTS, spec=replace(FACTS.spec, technique=PrefixTuning())))
    assert "needs peft" in prefixed
    assert "in 4 bits" not in prefixed


def test_facts_come_back_from_a_manifest_whole() -> None:
    assert CARD_FACTS.decode(CARD_FACTS.encode(FACTS)) == FACTS
