"""Low-rank factors as a result holds them: plain LoRA that any tool loads on the untouched base model, whatever was trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

# Beside a result in another form than was trained: the parameters themselves, for going on from them.
PARAMETERS_NAME = "trained_parameters.safetensors"


@dataclass(frozen=True, slots=True)
class Factors:
    """What is added to a layer's weight is `up` [O, R] times `down` [R, I]."""

    down: torch.Tensor
    up: torch.Tensor

    def pad(self, rank: int) -> "Factors":
        """Give the same product in a higher rank."""
        missing = rank - len(self.down)
        pad = torch.nn.functional.pad
        return Factors(pad(self.down, (0, 0, 0, missing)), pad(self.up, (0, missing)))


def write_plain_lora(directory: Path, layers: Mapping[str, Factors], base_model: str | None) -> None:
    """Write peft's files: the largest rank for all layers, and no scaling beside the factors. Layers are named as in the base model."""
    rank = max(1, *(len(factors.down) for factors in layers.values()))
    tensors = {}
    for name, factors in layers.items():
        padded = factors.pad(rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = padded.down.float().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = padded.up.float().cpu().contiguous()
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(layers), task_type="CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=base_model,
    )  # fmt: skip
    config.save_pretrained(str(directory))
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
