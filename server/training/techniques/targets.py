"""Finds the layers that a technique works on by what they are, so that families without a table of names have them too."""

from collections.abc import Sequence
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from server.domain.jobs import FailureReason, JobFailure
from server.domain.techniques import ALL_LINEAR


def choose_targets(targets: tuple[str, ...]) -> str | list[str]:
    """Give the names of layers as peft takes them."""
    return ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets)


def add_adapter(model: PreTrainedModel, config: PeftConfig, targets: tuple[str, ...] = (ALL_LINEAR,)) -> PeftModel:
    """Freeze the model and put peft's method beside its layers. Raises JobFailure for a target that the model has no layer for.

    peft itself passes over a name that fits nothing as long as another one does: half of what was asked would be trained.
    """
    names = [f".{name}" for name, _ in model.named_modules()]
    lost = [target for target in targets if target != ALL_LINEAR and not any(name.endswith(f".{target}") for name in names)]
    if lost:
        raise _refuse(lost)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise _refuse(targets) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def _refuse(targets: Sequence[str]) -> JobFailure:
    return JobFailure(
        FailureReason.BASE_MODEL_UNAVAILABLE,
        f"The base model has no linear layers named {', '.join(targets)[:200]}.",
        "Set target_modules to all-linear, or to names of its linear layers.",
    )


def list_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Give the linear layers but the output head, by name."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def list_norms(model: PreTrainedModel) -> list[str]:
    """Give the names of the normalisation layers that have weights."""
    return [
        name
        for name, layer in model.named_modules()
        if ("Norm" in type(layer).__name__) and any(True for _ in layer.parameters(recurse=False))
    ]
