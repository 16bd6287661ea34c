"""The catalogue's shapes are those of the real architectures: each is built from its published configuration on torch's meta device."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.basemodels.sources import BaseModelSource
from server.domain.base_models import BASE_MODELS, BaseModel
from server.domain.shapes import Linear, ModelShape
from tests.tiny_models import build_tiny_causal_model

BY_SHAPE = {model.shape: model for model in BASE_MODELS}

# As the hub and the makers' papers state them, to the last weight.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo": 12_247_782_400,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
}


def _configure(model: BaseModel) -> Mapping[str, object]:
    shape = model.shape
    falcon = {
        "num_kv_heads": shape.key_head_count,
        "multi_query": shape.key_head_count == 1,
        "new_decoder_architecture": shape.key_head_count > 1,
        "parallel_attn": True,
        "bias": False,
    }
    return {
        "vocab_size": shape.vocabulary_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layer_count,
        "num_attention_heads": shape.head_count,
        "tie_word_embeddings": shape.tied_embeddings,
        **(
            falcon
            if model.family == "falcon"
            else {
                "intermediate_size": shape.intermediate_size,
                "num_key_value_heads": shape.key_head_count,
                "head_dim": shape.head_size,
                "pad_token_id": None,
            }
        ),
    }


def _build(model: BaseModel) -> PreTrainedModel:
    config = AutoConfig.for_model(model.family, **_configure(model))
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    assert isinstance(built, PreTrainedModel)
    return built


def _list_linears(built: PreTrainedModel) -> list[Linear]:
    head = built.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    return [
        Linear(name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in built.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


@pytest.mark.parametrize("shape", BY_SHAPE, ids=lambda shape: BY_SHAPE[shape].base_model_id)
def test_a_shape_is_that_of_the_architecture(shape: ModelShape) -> None:
    built = _build(BY_SHAPE[shape])
    assert sum(parameter.numel() for parameter in built.parameters()) == shape.parameter_count
    linears = _list_linears(built)
    assert sorted(linears, key=repr) == sorted(shape.linears * shape.layer_count, key=repr)
    assert sum(linear.weights for linear in linears) == shape.linear_weights


@pytest.mark.parametrize("alias", PUBLISHED)
def test_a_count_is_the_published_one(alias: str) -> None:
    model = next(model for model in BASE_MODELS if alias in model.aliases)
    assert model.parameter_count == PUBLISHED[alias]


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon", "qwen2", "gemma"])
def test_the_shape_of_a_local_model_is_read_from_its_files(family: str, tmp_path: Path) -> None:
    directory = build_tiny_causal_model(tmp_path / "models" / family, family)
    source = BaseModelSource(tmp_path / "cache", allowed_local_roots=[tmp_path / "models"])
    shape = source.read_shape(str(directory))
    built = AutoModelForCausalLM.from_pretrained(directory)
    assert shape is not None
    assert shape.parameter_count == sum(parameter.numel() for parameter in built.parameters())
    assert sorted(shape.linears * shape.layer_count, key=repr) == sorted(_list_linears(built), key=repr)
    assert shape.key_head_count <= shape.head_count


def test_of_a_model_that_was_never_seen_no_shape_is_known(tmp_path: Path) -> None:
    assert BaseModelSource(tmp_path, offline=True).read_shape("nobody/nothing") is None
