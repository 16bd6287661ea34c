"""Merges a peft adapter into the weights of its base model: in float32, one layer at a time, each then rounded to the model's type.

Knows no artefacts and no jobs: a directory as peft writes it, and a model in memory.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from server.domain.errors import FailedPrecondition


def attach_adapter(model: PreTrainedModel, directory: Path) -> PeftModelForCausalLM:
    """Put an adapter beside a model's layers, ready to evaluate and to merge. The model belongs to the result from then on.

    Raises FailedPrecondition: ADAPTER_INVALID where the files do not fit the model, tensor by tensor, ADAPTER_NOT_MERGEABLE for a
    method whose virtual tokens are no part of any weight.
    """
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if config.is_prompt_learning:
            raise FailedPrecondition(
                "Virtual tokens are no part of any weight: a prompt or prefix cannot be merged into the base model.",
                reason="ADAPTER_NOT_MERGEABLE",
            )
        config.inference_mode = True
        adapted = PeftModelForCausalLM(model, config)
        loaded = adapted.load_adapter(str(directory), "default", torch_device=str(model.device))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _invalid("it does not fit the base model") from error
    odd = [*loaded.missing_keys, *loaded.unexpected_keys]
    if odd:
        raise _invalid(f"tensor {odd[0][:200]!r} is missing or has no place in the base model")
    adapted.train(False)
    return adapted


def merge_adapter(adapted: PeftModelForCausalLM) -> PreTrainedModel:
    """Write the adapter into the weights and give the plain model, in the type that it had.

    Raises FailedPrecondition (ADAPTER_INVALID) where a merged weight is not finite.
    """
    model = adapted.get_base_model()
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        for layer in _adapted_layers(adapted):
            _untie(model, layer)
            _merge_layer(layer)
    tuner = adapted.base_model
    assert isinstance(tuner, BaseTuner)
    tuner.unload()
    return model


def _adapted_layers(adapted: PeftModelForCausalLM) -> Iterator[BaseTunerLayer]:
    return (module for module in list(adapted.modules()) if isinstance(module, BaseTunerLayer))


def _merge_layer(layer: BaseTunerLayer) -> None:
    base = layer.get_base_layer()
    dtype = _weight_of(base).dtype
    base.float()
    layer.merge()
    # Some methods swap the base layer for another: ask again.
    merged = layer.get_base_layer()
    if not all(torch.isfinite(parameter).all() for parameter in merged.parameters()):
        raise _invalid("a merged weight is not finite")
    merged.to(dtype)


def _untie(model: PreTrainedModel, layer: BaseTunerLayer) -> None:
    """Give an output head that shares its weight with the embedding one of its own: the adapter is for the head alone."""
    base, embedding = layer.get_base_layer(), model.get_input_embeddings()
    if base is not embedding and _weight_of(base) is _weight_of(embedding):
        base.register_parameter("weight", nn.Parameter(_weight_of(base).detach().clone(), requires_grad=False))
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _weight_of(layer: nn.Module) -> torch.Tensor:
    assert isinstance(layer.weight, torch.Tensor)
    return layer.weight


def _invalid(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"The adapter cannot be merged: {what}.", reason="ADAPTER_INVALID")
