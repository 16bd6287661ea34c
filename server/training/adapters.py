"""Low-rank adapters beside frozen weights, through peft, so that any tool that reads peft's format can read the result."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from server.domain.jobs import FailureReason, JobFailure
from server.domain.techniques import LoraTechnique

ALL_LINEAR = "all-linear"


def add_lora(model: PreTrainedModel, technique: LoraTechnique, *, seed: int) -> PeftModel:
    """Freeze the model and put adapters beside the technique's linear layers: float32, the first factor drawn from `seed`.

    Raises JobFailure when the model has no such layers.
    """
    targets = technique.target_modules
    config = LoraConfig(
        r=technique.rank,
        lora_alpha=technique.alpha,  # type: ignore[arg-type]  # peft says int and takes any number
        lora_dropout=technique.dropout,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise JobFailure(
            FailureReason.BASE_MODEL_UNAVAILABLE,
            f"The base model has no linear layers named {', '.join(targets)[:200]}.",
            "Set target_modules to all-linear, or to names of its linear layers.",
        ) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Give the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
