"""Loads tokenizers and causal language models from a local directory: safetensors only, never code of the model's own."""

from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from server.basemodels.errors import BaseModelRefused
from server.basemodels.quantization import FourBits
from server.basemodels.streaming import forget_quantizer, four_bit_loading

# Names that published tokenizers give to a token meant for padding, best first.
PAD_TOKEN_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>", "<|reserved_special_token_0|>")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a pad token that is not its end token. Raises BaseModelRefused when there is none to load."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelRefused("The model's directory holds no tokenizer that can be loaded.", reason="TOKENIZER_INVALID") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.eos_token_id is None:
        raise BaseModelRefused("The model's tokenizer has no end token: what it learns could never stop.", reason="TOKENIZER_INVALID")
    set_distinct_pad_token(tokenizer)
    return tokenizer


def set_distinct_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that differs from its end token, without growing the vocabulary.

    A pad token that equals the end token invites masking by token, and then a model that never stops (trl issue 1623).
    """
    end = tokenizer.eos_token
    if tokenizer.pad_token is not None and tokenizer.pad_token != end:
        return
    vocabulary = tokenizer.get_vocab()
    named = [name for name in PAD_TOKEN_NAMES if name in vocabulary]
    others = [str(token) for token in tokenizer.all_special_tokens]
    first_ids = sorted(vocabulary, key=lambda token: vocabulary[token])
    tokenizer.pad_token = next(token for token in (*named, *others, *first_ids) if token != end)


def load_causal_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    exact: bool = False,
    held: FourBits | None = None,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode. Raises BaseModelRefused when transformers cannot load it safely.

    `attention` None: the fastest that the architecture has. A weight that the files lack is refused, where transformers would make one
    up; with `exact` also one that the architecture does not know. With `held` linear layers go into 4 bits while they are read.
    """
    in_four_bits = four_bit_loading(held, torch.device(device)) if held is not None else None
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True, **({} if in_four_bits is None else {"quantization_config": in_four_bits}),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelRefused(
            "The model's directory holds no causal language model that can be loaded.", reason="MODEL_INVALID"
        ) from error
    model, found = cast(tuple[PreTrainedModel, dict[str, set[str]]], loaded)
    if odd := sorted({*found["missing_keys"], *(found["unexpected_keys"] if exact else ())}):
        raise BaseModelRefused(f"The model's files and its architecture differ in {odd[0]}.", reason="MODEL_INVALID")
    if held is not None:
        forget_quantizer(model)
    model.to(device)  # type: ignore[arg-type]  # transformers types `to` for its own wrappers only
    model.train(False)
    return model


def preferred_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """Give bfloat16 where the device multiplies it natively (AVX-512 BF16 or AMX; compute capability 8), else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def count_context_tokens(model: PreTrainedModel) -> int:
    """Give the longest sequence that the model takes, in tokens."""
    return _count_context_tokens(model.config)


def read_context_tokens(directory: Path) -> int:
    """Give the same of a model that is not loaded. Raises BaseModelRefused where it has no configuration that can be read."""
    try:
        return _count_context_tokens(AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelRefused("The model's directory holds no configuration that can be read.", reason="MODEL_INVALID") from error


def _count_context_tokens(config: PreTrainedConfig) -> int:
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
