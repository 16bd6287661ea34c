"""From a technique by name to a model under training."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from server.domain.techniques import (
    AdaLora,
    FullTechnique,
    Ia3,
    LayerNormTuning,
    LoraTechnique,
    Oft,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QloraTechnique,
    Technique,
    Vera,
)
from server.training.techniques.adalora import AdaLoraTrained
from server.training.techniques.full import train_full
from server.training.techniques.ia3 import train_ia3
from server.training.techniques.layer_norm import LayerNormTrained
from server.training.techniques.lora import Probe, train_lora
from server.training.techniques.oft import train_oft
from server.training.techniques.prompts import train_encoded_prompt, train_prefix, train_prompt
from server.training.techniques.qlora import train_qlora
from server.training.techniques.trained import Trained
from server.training.techniques.vera import train_vera


def apply_technique(
    model: PreTrainedModel,
    technique: Technique,
    *,
    seed: int,
    total_steps: int,
    probe: Probe = lambda: (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_directory: Path | None = None,
) -> Trained:
    """Make a freshly loaded model ready for training; what is drawn is drawn from `seed`.

    `probe` gives some of the records, asked for where a technique starts from the data (EVA); `tokenizer` reads a prompt's initial text;
    `base_directory` tells in which type a whole model is stored. Raises JobFailure where the model has no layers for the technique.
    """
    torch.manual_seed(seed)
    match technique:
        case FullTechnique():
            return train_full(model, base_directory)
        case LoraTechnique():
            return train_lora(model, technique, probe, seed)
        case QloraTechnique():
            return train_qlora(model, technique, probe, seed)
        case PromptTuning():
            return train_prompt(model, technique, tokenizer, seed)
        case PTuning():
            return train_encoded_prompt(model, technique)
        case PrefixTuning():
            return train_prefix(model, technique, seed)
        case Ia3():
            return train_ia3(model)
        case AdaLora():
            return AdaLoraTrained(model, technique, total_steps)
        case Vera():
            return train_vera(model, technique, seed)
        case Oft():
            return train_oft(model, technique)
        case LayerNormTuning():
            return LayerNormTrained(model)
