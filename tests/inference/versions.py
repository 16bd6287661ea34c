"""Versions of every technique, made with peft itself and sealed as training seals them; and what plain transformers and peft say."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.basemodels.loading import load_tokenizer
from server.basemodels.quantization import dequantize_in_place
from server.basemodels.rendering import PROBE, effective_template, render
from server.domain.techniques import Quantization
from server.storage.artefacts import Artefact, ArtefactStore, Described

VIRTUAL_TOKENS = 7
NORMS = {"falcon": ["input_layernorm"], "default": ["input_layernorm", "post_attention_layernorm", "norm"]}
IA3 = {"falcon": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]), "default": (["k_proj", "v_proj", "down_proj"], ["down_proj"])}
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LINEAR: dict[str, Any] = {"target_modules": "all-linear", **CAUSAL}


def _prefix(model: PreTrainedModel, _: str) -> PeftConfig:
    layer = model(torch.tensor([[3]]), use_cache=True).past_key_values.layers[0]
    heads, width = layer.keys.shape[1], layer.keys.shape[3]
    return PrefixTuningConfig(
        num_virtual_tokens=VIRTUAL_TOKENS, num_layers=2, num_attention_heads=heads, token_dim=heads * width,
        encoder_hidden_size=heads * width, **CAUSAL,
    )  # fmt: skip


def _ia3(_: PreTrainedModel, family: str) -> PeftConfig:
    targets, feed_forward = IA3.get(family, IA3["default"])
    return IA3Config(target_modules=targets, feedforward_modules=feed_forward, **CAUSAL)


CONFIGS: Mapping[str, Callable[[PreTrainedModel, str], PeftConfig]] = {
    "lora": lambda *_: LoraConfig(r=4, lora_alpha=8, **LINEAR),
    "rslora": lambda *_: LoraConfig(r=4, lora_alpha=6, use_rslora=True, **LINEAR),
    "dora": lambda *_: LoraConfig(r=4, lora_alpha=8, use_dora=True, **LINEAR),
    "adalora": lambda *_: AdaLoraConfig(init_r=6, target_r=4, total_step=10, lora_alpha=9, **LINEAR),
    "vera": lambda *_: VeraConfig(r=12, **LINEAR),
    "oft": lambda *_: OFTConfig(oft_block_size=16, **LINEAR),
    "ia3": _ia3,
    "layer_norm_tuning": lambda _, family: LNTuningConfig(target_modules=NORMS.get(family, NORMS["default"]), **CAUSAL),
    "prompt_tuning": lambda *_: PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, **CAUSAL),
    "p_tuning": lambda *_: PromptEncoderConfig(num_virtual_tokens=VIRTUAL_TOKENS, encoder_hidden_size=32, **CAUSAL),
    "prefix_tuning": _prefix,
}


def load_plain(base: Path, quantization: str = "", double_quantization: bool = False) -> Any:
    """Load a base in float32 as it was trained on: rounded to 4 bits and back where it was quantised."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if quantization:
        dequantize_in_place(model, Quantization(quantization), double_quantization)
    return model


def make_version(
    storage: Path,
    path: str,
    base: Path,
    technique: str,
    *,
    seed: int = 1,
    family: str = "llama",
    scale: float = 0.5,
    described: Mapping[str, Described] = MappingProxyType({}),
) -> Artefact:
    """Seal a version whose weights are moved at random by `scale`, a tenth of it for a whole model (`technique` "full")."""

    def fill(directory: Path) -> Mapping[str, Described]:
        model = load_plain(base)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            if technique != "full":
                model = get_peft_model(model, CONFIGS[technique](model, family))
                if technique == "adalora":
                    _prune(model)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "ranknum" not in name:
                    parameter.add_(torch.randn_like(parameter) * (scale / 10 if technique == "full" else scale))
        model.save_pretrained(directory)
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = effective_template(tokenizer)
        tokenizer.save_pretrained(directory)
        kind = "model" if technique == "full" else "adapter"
        golden = render(tokenizer, PROBE).token_ids
        return {"kind": kind, "technique": technique, "base_model": family, "golden_token_ids": golden, "stop_token_ids": [2], **described}

    return ArtefactStore(storage).write(path, fill)


def _prune(model: Any) -> None:
    """Let AdaLoRA have dropped some ranks, and all of one layer's, and have zeroed one that it keeps."""
    masks = {}
    for number, (name, parameter) in enumerate((n, p) for n, p in model.base_model.model.named_parameters() if "lora_E" in n):
        masks[name] = [number != 1 and (rank + number) % 3 != 0 for rank in range(parameter.shape[0])]
    model.peft_config["default"].rank_pattern = masks


def load_reference(artefact: Artefact, base: Path) -> Any:
    """Load a version as anyone would: by transformers, and peft where it is an adapter."""
    described = artefact.description
    if described["kind"] == "model":
        return load_plain(artefact.directory)
    model = load_plain(base, str(described.get("quantization", "")), bool(described.get("double_quantization", False)))
    return PeftModel.from_pretrained(model, str(artefact.directory)).eval()


def continue_plainly(model: Any, token_ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Continue greedily by whole forward passes without a cache; give the tokens and their log probabilities."""
    ids, logprobs = list(token_ids), []
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0, -1]
            logprob, token = torch.log_softmax(logits.float(), dim=-1).max(dim=-1)
            ids.append(int(token))
            logprobs.append(float(logprob))
    return ids[len(token_ids) :], logprobs
