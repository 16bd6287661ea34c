"""Learned virtual tokens before every record: embeddings, embeddings through an encoder, or the keys and values of every layer."""

import math
from pathlib import Path

import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, PromptTuningInit, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from server.domain.techniques import PrefixTuning, PromptTuning, PTuning
from server.training.techniques.trained import Trained, cannot_start, check_shapes

# The result of p-tuning holds what its encoder gives; the encoder itself is kept for going on from there.
ENCODER_NAME = "prompt_encoder.safetensors"


def train_prompt(model: PreTrainedModel, technique: PromptTuning, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> Trained:
    """Learn embeddings that start as those of a text's tokens, or of tokens drawn from `seed` (Lester et al. 2021)."""
    ids = _choose_tokens(model, technique, tokenizer, seed)
    config = PromptTuningConfig(
        num_virtual_tokens=technique.virtual_tokens, prompt_tuning_init=PromptTuningInit.RANDOM, task_type="CAUSAL_LM"
    )
    adapted = _add_prompt(model, config)
    with torch.no_grad():
        _embedding_of(adapted).copy_(_embed(model, ids))
    return Trained(adapted)


def _embed(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    embeddings: torch.Tensor = model.get_input_embeddings()(ids.to(model.device))
    return embeddings


def _choose_tokens(model: PreTrainedModel, technique: PromptTuning, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> torch.Tensor:
    if not technique.initial_text:
        return _draw_tokens(model, technique.virtual_tokens, seed)
    assert tokenizer is not None
    ids = tokenizer(technique.initial_text, add_special_tokens=False)["input_ids"]
    return torch.tensor((list(ids) * math.ceil(technique.virtual_tokens / len(ids)))[: technique.virtual_tokens])


def _draw_tokens(model: PreTrainedModel, count: int, seed: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


class EncodedPromptTrained(Trained):
    """P-tuning: only what the encoder gives is needed for answers, so peft saves nothing else."""

    def save(self, directory: Path) -> None:
        """Write the embeddings as peft reads them, and the encoder beside them."""
        super().save(directory)
        save_file({name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters.items()}, directory / ENCODER_NAME)

    def warm_start(self, directory: Path) -> None:
        """Take the encoder of a result of the same shape. Raises JobFailure(BASE_MODEL_UNAVAILABLE) for another."""
        if not (directory / ENCODER_NAME).is_file():
            raise cannot_start("it was not trained by p-tuning")
        found = load_file(directory / ENCODER_NAME)
        check_shapes({name: p.shape for name, p in self.parameters.items()}, {name: tensor.shape for name, tensor in found.items()})
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found[name])


def train_encoded_prompt(model: PreTrainedModel, technique: PTuning) -> Trained:
    """Learn embeddings through a multi-layer perceptron (Liu et al. 2021)."""
    width = technique.encoder_hidden_size or model.config.get_text_config().hidden_size
    config = PromptEncoderConfig(num_virtual_tokens=technique.virtual_tokens, encoder_hidden_size=width, task_type="CAUSAL_LM")
    return EncodedPromptTrained(_add_prompt(model, config))


def train_prefix(model: PreTrainedModel, technique: PrefixTuning, seed: int) -> Trained:
    """Learn keys and values, which start as those of tokens drawn from `seed`: made-up ones drown the model (Li and Liang 2021)."""
    ids = _draw_tokens(model, technique.virtual_tokens, seed).to(model.device)
    with torch.no_grad():
        cache = model(input_ids=ids[None], use_cache=True).past_key_values
    layers = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]  # each [2, K, V, width]
    _, heads, _, width = layers[0].shape
    config = PrefixTuningConfig(
        num_virtual_tokens=technique.virtual_tokens, num_layers=len(layers), num_attention_heads=heads, token_dim=heads * width,
        encoder_hidden_size=heads * width, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = _add_prompt(model, config)
    with torch.no_grad():  # [layers * 2, K, V, width] to [V, layers * 2 * K * width], as peft reads it
        _embedding_of(adapted).copy_(torch.cat(layers).permute(2, 0, 1, 3).reshape(technique.virtual_tokens, -1))
    return Trained(adapted)


def _add_prompt(model: PreTrainedModel, config: PromptTuningConfig | PromptEncoderConfig | PrefixTuningConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    # peft makes them in the default type, but takes care of it for adapters in layers only.
    adapted.prompt_encoder.float()
    return adapted


def _embedding_of(model: PeftModel) -> nn.Parameter:
    weight = model.get_parameter("prompt_encoder.default.embedding.weight")
    assert isinstance(weight, nn.Parameter)
    return weight
