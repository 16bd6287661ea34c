"""A model under training, whatever the technique: what is trained of it, what goes into checkpoints, and how its result is written."""

from collections.abc import Mapping, Set
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from server.domain.jobs import FailureReason, JobFailure
from server.domain.techniques import Quantization

Model = PeftModel | PreTrainedModel


class Trained:
    """The common case: peft keeps the trained parameters in float32 and writes and reads them itself.

    Parameters in bfloat16 have float32 masters, which the optimiser keeps; their gradients are added up in float32 too.
    """

    # What the result is, as its manifest says.
    kind = "adapter"
    # How the weights that it was trained on are held; None: as they are.
    quantization: Quantization | None = None
    double_quantization = False

    def __init__(self, model: Model, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        self.model = model
        self.parameters: dict[str, nn.Parameter] = dict(parameters or find_trainable(model))
        for parameter in self.parameters.values():
            assert parameter.dtype in (torch.float32, torch.bfloat16)
            parameter.grad_dtype = torch.float32

    @property
    def peft(self) -> PeftModel:
        """The model as peft's."""
        assert isinstance(self.model, PeftModel)
        return self.model

    def after_step(self, step: int) -> None:
        """Take note of an optimiser step: called with its number, from 1, after the update and before the gradients are dropped."""

    def penalty(self) -> torch.Tensor | None:
        """Give what the technique adds to a step's mean loss, once per step; None when it adds nothing."""
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """Give what besides the parameters a checkpoint must hold."""
        return {}

    def fits_state(self, names: Set[str]) -> bool:
        """Tell whether a checkpoint's state of these names is of this technique."""
        return not names

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` gave, after the parameters."""

    def save(self, directory: Path) -> None:
        """Write the weights as peft or transformers read them; what was trained from them can go on by `warm_start`."""
        self.peft.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)

    def warm_start(self, directory: Path) -> None:
        """Take the weights of a result of the same technique and shape. Raises JobFailure(BASE_MODEL_UNAVAILABLE) for another."""
        load_adapter_weights(self.peft, directory)


def load_adapter_weights(model: PeftModel, directory: Path) -> None:
    """Take the weights of a result of peft's. Raises JobFailure(BASE_MODEL_UNAVAILABLE) when they are not of the same shapes."""
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise cannot_start("it is no adapter")
    tensors = load_file(path)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_shapes({name: tensor.shape for name, tensor in expected.items()}, {name: tensor.shape for name, tensor in tensors.items()})
    set_peft_model_state_dict(model, tensors)


def find_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_shapes(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    """Raise JobFailure unless both name the same tensors of the same shapes."""
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())[0]
        raise cannot_start(f"it trains other layers or with another technique ({odd[:120]})")
    for name, shape in expected.items():
        if found[name] != shape:
            raise cannot_start(f"{name[:120]} has shape {tuple(found[name])} there and {tuple(shape)} here")


def cannot_start(why: str) -> JobFailure:
    """Make the failure for a version that cannot be started from."""
    return JobFailure(
        FailureReason.BASE_MODEL_UNAVAILABLE,
        f"Training cannot start from the weights of that version: {why}.",
        "Choose a version of the same base model and technique, with the same rank, layers and sizes, or leave warm_start_from out.",
    )
