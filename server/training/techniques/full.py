"""Every weight. The result is a model of its own, as transformers reads it."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from server.basemodels.loading import load_causal_model
from server.training.techniques.trained import Trained, cannot_start, check_shapes

MAX_SHARD_SIZE = "5GB"


class FullTrained(Trained):
    """All parameters; a weight that is tied to another is trained once."""

    kind = "model"

    def __init__(self, model: PreTrainedModel, stored_dtype: torch.dtype | None) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self._stored_dtype = stored_dtype or model.dtype
        super().__init__(model)

    @property
    def causal(self) -> PreTrainedModel:
        """The model as transformers'."""
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def save(self, directory: Path) -> None:
        """Write a directory of transformers, in the type in which the base model's weights are stored."""
        attention = self.causal.config._attn_implementation
        self.causal.set_attn_implementation("sdpa" if self.causal._supports_sdpa else "eager")
        dtype = self._stored_dtype
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in self._state().items()}
        self.causal.save_pretrained(directory, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
        self.causal.set_attn_implementation(attention)
        # transformers notes the type that the model computes in.
        path = directory / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")

    def warm_start(self, directory: Path) -> None:
        """Take the weights of a whole model of the same shape. Raises JobFailure(BASE_MODEL_UNAVAILABLE) for another."""
        if not (directory / CONFIG_NAME).is_file():
            raise cannot_start("it is no whole model")
        # Through transformers: some families' files have other names than their layers.
        found = dict(load_causal_model(directory, dtype=self.model.dtype).named_parameters())
        held = dict(self.causal.named_parameters())
        check_shapes({name: weight.shape for name, weight in held.items()}, {name: weight.shape for name, weight in found.items()})
        with torch.no_grad():
            for name, weight in held.items():
                weight.copy_(found[name])

    def _state(self) -> dict[str, torch.Tensor]:
        return dict(self.causal.state_dict())


def train_full(model: PreTrainedModel, base_directory: Path | None) -> FullTrained:
    """Train every weight. `base_directory` says in which type the weights are stored; None: in the model's."""
    stored = AutoConfig.from_pretrained(base_directory, trust_remote_code=False).dtype if base_directory is not None else None
    return FullTrained(model, stored if isinstance(stored, torch.dtype) else None)
