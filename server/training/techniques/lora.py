"""Low-rank adapters beside frozen weights (Hu et al. 2021), with rsLoRA, DoRA and other starts.

PiSSA and OLoRA train what they take out of the frozen weights. Here the weights stay as they are: the start is subtracted by a second,
frozen adapter, which is the same function, exact in any type, and a plain LoRA of twice the rank when saved.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, LoraModel, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from server.domain.techniques import LoraInitialization, LoraTechnique
from server.training.batches import MicroBatch
from server.training.techniques.factors import PARAMETERS_NAME, Factors, write_plain_lora
from server.training.techniques.initialization import InputSketch, factor_orthonormal, factor_principal, watch_inputs
from server.training.techniques.targets import add_adapter, choose_targets
from server.training.techniques.trained import Trained, cannot_start, check_shapes, find_trainable

ADAPTER = "default"
START = "start"

Probe = Callable[[], Sequence[MicroBatch]]


def make_config(technique: LoraTechnique) -> LoraConfig:
    """Give peft's configuration of it, at the standard start."""
    return LoraConfig(
        r=technique.rank,
        lora_alpha=technique.alpha,  # type: ignore[arg-type]  # peft says int and takes any number
        lora_dropout=technique.dropout,
        target_modules=choose_targets(technique.target_modules),
        use_rslora=technique.rank_stabilized,
        use_dora=technique.dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def train_lora(model: PreTrainedModel, technique: LoraTechnique, probe: Probe, seed: int) -> Trained:
    """Freeze the model and put adapters beside its layers: float32, started as the technique says."""
    adapted = add_adapter(model, make_config(technique), technique.target_modules)
    match technique.initialization:
        case LoraInitialization.PISSA:
            return _start_from_weights(adapted, technique, lambda layer, scaling: factor_principal(layer, technique.rank, scaling))
        case LoraInitialization.OLORA:
            return _start_from_weights(adapted, technique, lambda layer, _: factor_orthonormal(layer, technique.rank))
        case LoraInitialization.EVA:
            start_from_inputs(adapted, technique.rank, probe(), seed)
    return Trained(adapted)


def lora_layers(model: PeftModel) -> dict[str, LoraLinear]:
    """Give the layers with adapters, named as in the base model."""
    return {name: layer for name, layer in base_of(model).named_modules() if isinstance(layer, LoraLinear)}


def base_of(model: PeftModel) -> PreTrainedModel:
    """Give the model that the adapters are in."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def _factors_of(layer: LoraLinear, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Give an adapter's factors, [R, I] and [O, R]."""
    return cast(torch.Tensor, layer.lora_A[adapter].weight), cast(torch.Tensor, layer.lora_B[adapter].weight)


@torch.no_grad()
def set_factors(layer: LoraLinear, factors: Factors, adapter: str = ADAPTER, sign: float = 1.0) -> None:
    """Let an adapter of the layer be these factors, `up` times `sign`; directions that they lack stay as they are."""
    rank = len(factors.down)
    down, up = _factors_of(layer, adapter)
    down[:rank].copy_(factors.down)
    up[:, :rank].copy_(factors.up * sign)


def start_from_inputs(model: PeftModel, rank: int, batches: Sequence[MicroBatch], seed: int) -> None:
    """Let the first factors read the directions in which each layer's inputs vary most (EVA), at the same rank everywhere."""
    layers = lora_layers(model)
    generator = torch.Generator().manual_seed(seed)
    sketches = {name: InputSketch(rank, cast(int, layer.in_features), generator) for name, layer in layers.items()}
    was_training = model.training
    model.eval()
    with torch.no_grad(), watch_inputs(layers, lambda name, inputs: sketches[name].add(inputs)):
        for batch in batches:
            for ids in torch.split(batch.token_ids, list(batch.lengths)):
                base_of(model).base_model(input_ids=ids[None], use_cache=False)
    model.train(was_training)
    if batches:
        for name, layer in layers.items():
            directions = sketches[name].directions()
            with torch.no_grad():
                _factors_of(layer, ADAPTER)[0][: len(directions)].copy_(directions)


def _start_from_weights(model: PeftModel, technique: LoraTechnique, factor: Callable[[torch.Tensor, float], Factors]) -> Trained:
    model.add_adapter(START, make_config(technique))
    for layer in lora_layers(model).values():
        layer.lora_dropout[START] = nn.Identity()
        factors = factor(cast(torch.Tensor, layer.get_base_layer().weight), layer.scaling[ADAPTER])
        set_factors(layer, factors)
        set_factors(layer, factors, START, sign=-1.0)
        if len(factors.down) < technique.rank:  # a layer with fewer inputs or outputs than ranks
            with torch.no_grad():
                rest = slice(len(factors.down), None)
                _factors_of(layer, START)[0][rest].copy_(_factors_of(layer, ADAPTER)[0][rest])
    cast(LoraModel, model.base_model).set_adapter([ADAPTER, START])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name and "lora_" in name)
    return StartedFromWeights(model)


class StartedFromWeights(Trained):
    """An adapter and its frozen start, of which a result is the difference."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__(model, find_trainable(model))

    def state(self) -> dict[str, torch.Tensor]:
        """Give the start: another machine would factor the weights in other roundings."""
        return {name: parameter.detach() for name, parameter in self._start().items()}

    def fits_state(self, names: Set[str]) -> bool:
        """Tell whether it is a start."""
        return names == self._start().keys()

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the start."""
        with torch.no_grad():
            for name, parameter in self._start().items():
                parameter.copy_(tensors[name])

    def save(self, directory: Path) -> None:
        """Write the difference as plain LoRA, and adapter and start beside it."""
        layers = {}
        for name, layer in lora_layers(self.peft).items():
            downs, ups = zip(*(_factors_of(layer, adapter) for adapter in (ADAPTER, START)), strict=True)
            layers[name] = Factors(torch.cat(downs).detach(), torch.cat(ups, dim=1).detach() * layer.scaling[ADAPTER])
        write_plain_lora(directory, layers, self.peft.peft_config[ADAPTER].base_model_name_or_path)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self._all().items()}, directory / PARAMETERS_NAME)

    def warm_start(self, directory: Path) -> None:
        """Take adapter and start of a result of the same shape. Raises JobFailure(BASE_MODEL_UNAVAILABLE) for another."""
        if not (directory / PARAMETERS_NAME).is_file():
            raise cannot_start("its adapter started in another way")
        found = load_file(directory / PARAMETERS_NAME)
        own = self._all()
        check_shapes({name: tensor.shape for name, tensor in own.items()}, {name: tensor.shape for name, tensor in found.items()})
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(found[name])

    def _start(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.peft.named_parameters() if name.endswith(f".{START}.weight")}

    def _all(self) -> dict[str, nn.Parameter]:
        return {**self.parameters, **self._start()}
