"""The catalogue: every promised model is there, under its names, with facts that agree with each other."""

import pytest

from server.domain.base_models import BASE_MODELS, NO_MISTRAL_13B_NOTE
from server.domain.catalogue import (
    EMBEDDING_MODELS,
    FARASA_REFUSAL,
    Pooling,
    Preparation,
    find_base_model,
    find_embedding_model,
)

BILLION = 1e9


@pytest.mark.parametrize(
    ("name", "family", "billions"),
    [
        ("mistral-7b", "mistral", 7.2),
        ("mistral-13b", "mistral", 12.2),
        ("llama-7b", "llama", 6.7),
        ("llama-13b", "llama", 13.0),
        ("llama-70b", "llama", 69.0),
        ("falcon-7b", "falcon", 6.9),
        ("falcon-40b", "falcon", 41.3),
    ],
)
def test_each_promised_base_model_is_found_by_its_plain_name(name: str, family: str, billions: float) -> None:
    model = find_base_model(name)
    assert model is not None
    assert model.family == family
    assert model.parameter_count / BILLION == pytest.approx(billions, abs=0.06)
    assert model.size_bytes == 2 * model.parameter_count


def test_mistral_13b_means_nemo_and_says_so() -> None:
    model = find_base_model("Mistral-13B")
    assert model is not None
    assert model.base_model_id == "mistralai/Mistral-Nemo-Base-2407"
    assert NO_MISTRAL_13B_NOTE in model.note


def test_the_packaged_models_answer_to_hub_name_and_alias() -> None:
    smol = find_base_model("smollm2-135m-instruct")
    assert smol is not None
    assert smol is find_base_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (smol.chat, smol.gated, smol.context_tokens) == (True, False, 8192)
    mini = find_embedding_model("all-minilm-l6-v2")
    assert mini is not None
    assert mini is find_embedding_model("sentence-transformers/all-MiniLM-L6-v2")
    assert (mini.dimension, mini.max_tokens, mini.pooling, mini.license) == (384, 256, Pooling.MEAN, "Apache-2.0")


def test_no_name_means_two_models() -> None:
    base = [name.casefold() for model in BASE_MODELS for name in (model.base_model_id, *model.aliases)]
    embedding = [name.casefold() for model in EMBEDDING_MODELS for name in (model.embedding_model_id, *model.aliases)]
    assert len(base) == len(set(base))
    assert len(embedding) == len(set(embedding))


def test_unknown_names_are_not_found() -> None:
    assert find_base_model("mistralai/Mistral-13B") is None
    assert find_base_model("") is None
    assert find_embedding_model("bge") is None


def test_who_must_accept_a_licence_first_is_marked() -> None:
    assert {model.family for model in BASE_MODELS if model.gated} == {"llama", "mistral", "gemma2"}
    assert all("Llama" in model.license for model in BASE_MODELS if "meta-llama" in model.base_model_id)
    assert not any(model.gated for model in BASE_MODELS if model.license == "MIT")


@pytest.mark.parametrize(
    "name", ["llama-2-70b", "llama-3-8b", "llama-3.1-70b", "llama-3.3-70b", "qwen2.5-7b-instruct", "gemma-2-9b-it", "phi-4"]
)
def test_the_generations_and_the_popular_others_are_there(name: str) -> None:
    model = find_base_model(name)
    assert model is not None
    assert model.lora_targets
    assert model.revision


def test_each_embedding_family_brings_what_it_needs() -> None:
    by_family = {model.family: model for model in EMBEDDING_MODELS}
    assert {"bge", "e5", "arabert", "camelbert", "sentence-transformers"} == set(by_family)
    assert (by_family["e5"].query_prefix, by_family["e5"].passage_prefix) == ("query: ", "passage: ")
    assert by_family["bge"].pooling is Pooling.CLS
    assert {model.pooling for model in EMBEDDING_MODELS if model.family != "bge"} == {Pooling.MEAN}
    assert {model.max_tokens for model in EMBEDDING_MODELS if "multilingual-m" in model.embedding_model_id.lower()} == {128}


def test_what_was_never_tuned_to_retrieve_is_marked_and_says_so() -> None:
    untuned = [model for model in EMBEDDING_MODELS if not model.tuned_for_retrieval]
    assert {model.family for model in untuned} == {"arabert", "camelbert"}
    assert all(model.note for model in untuned)


def test_arabert_that_needs_farasa_is_refused_with_another_choice() -> None:
    refused = {model.embedding_model_id for model in EMBEDDING_MODELS if model.refusal}
    assert refused == {"aubmindlab/bert-base-arabertv2", "aubmindlab/bert-base-arabert"}
    other = find_embedding_model("bert-base-arabertv02")
    assert other is not None
    assert other.preparation is Preparation.ARABERT_V02
    assert other.embedding_model_id in FARASA_REFUSAL
    assert other.text_preparation
