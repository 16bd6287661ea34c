"""Adapters on disk, as peft writes them, read for serving beside a base: low-rank factors, learned embeddings, learned keys and values.

An adapter that cannot be computed exactly as peft computes it is refused; nothing in a file is ever left unused.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from server.domain.errors import FailedPrecondition, Unimplemented
from server.inference.cache import CacheShape
from server.inference.lora import Adapter, Places
from server.inference.projections import Projection

ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
TENSOR_KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.(?P<name>lora_[ABE]|vera_lambda_[bd])(?:\.weight)?$")
VERA_MATRICES = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
PROMPT_KEY = "prompt_embeddings"
# Options of peft 0.21 under which an adapter is more than two matrices per layer. Unset or one of these values, they change nothing.
PLAIN_VALUES: tuple[object, ...] = (None, False, "", "none", (), {}, [])
UNSUPPORTED_OPTIONS = (
    "lora_bias", "bias", "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "velora_config", "monteclora_config", "arrow_config", "kasa_config",
)  # fmt: skip
# Ways to start the matrices that leave the base weights as they are. Others (pissa, olora, corda, …) change the base while training.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# AdaLoRA divides by the rank that it started with and this, so that a rank of zero would not end it.
ADALORA_EPSILON = 1e-5

Config = Mapping[str, object]
Tensors = Mapping[str, torch.Tensor]
Factors = tuple[torch.Tensor, torch.Tensor]


def read_config(directory: Path) -> Config:
    """Read and check an adapter's configuration. Raises FailedPrecondition (ADAPTER_INVALID), Unimplemented (ADAPTER_NOT_SUPPORTED)."""
    try:
        config = json.loads((directory / ADAPTER_CONFIG_NAME).read_text())
    except (OSError, ValueError) as error:
        raise _invalid("its configuration cannot be read") from error
    if not isinstance(config, dict):
        raise _invalid("its configuration is not an object")
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option) not in PLAIN_VALUES:
            raise unsupported_adapter(option)
    if config.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise unsupported_adapter(f"init_lora_weights {config['init_lora_weights']!r}")
    return config


def bound_rank(config: Config) -> int:
    """Give a rank that no layer of a low-rank adapter exceeds."""
    if config.get("peft_type") == "ADALORA":
        return _integer(config, "init_r")
    patterns = config.get("rank_pattern")
    listed = [rank for rank in patterns.values() if isinstance(rank, int)] if isinstance(patterns, dict) else []
    return max(_integer(config, "r"), *listed) if listed else _integer(config, "r")


def read_low_rank(directory: Path, places: Places) -> Adapter:
    """Read an adapter of LoRA, AdaLoRA or VeRA for a model whose projections are known by their module paths.

    Raises FailedPrecondition (ADAPTER_INVALID) for files that do not fit, Unimplemented (ADAPTER_NOT_SUPPORTED) for other methods.
    """
    config = read_config(directory)
    reader = LOW_RANK_READERS.get(str(config.get("peft_type")))
    if reader is None or config.get("use_dora"):
        raise unsupported_adapter("use_dora" if config.get("use_dora") else f"method {config.get('peft_type')}")
    matrices = {}
    for path, factors in reader(config, _group(read_tensors(directory), places)).items():
        if path not in places:
            raise _invalid(f"{path!r} has no place in the base model")
        matrices[places[path]] = _check_factors(path, factors, *places[path])
    if not matrices:
        raise _invalid("it holds no tensor")
    return Adapter(max(down.shape[0] for down, _ in matrices.values()), matrices)


def read_embeddings(directory: Path, width: int) -> torch.Tensor:
    """Read the learned embeddings [virtual tokens, width] of prompt tuning or p-tuning. Raises FailedPrecondition (ADAPTER_INVALID)."""
    embeddings = _read_prompt(directory)
    if embeddings.shape[1] != width:
        raise _invalid(f"its embeddings have {embeddings.shape[1]} numbers each, and the base model's {width}")
    return embeddings


def read_key_values(directory: Path, shape: CacheShape) -> torch.Tensor:
    """Read the learned keys and values of prefix tuning [layers, 2 x key heads, virtual tokens, head size], keys first.

    Raises FailedPrecondition (ADAPTER_INVALID) where they are not of the base model's shape.
    """
    flat = _read_prompt(directory)
    tokens, expected = flat.shape[0], 2 * shape.layers * shape.key_value_heads * shape.head_size
    if flat.shape[1] != expected:
        raise _invalid(f"its prefix has {flat.shape[1]} numbers for each token, and the base model's keys and values have {expected}")
    # peft lays them out as [tokens, layers, keys or values, heads, head size].
    by_layer = flat.view(tokens, shape.layers, 2 * shape.key_value_heads, shape.head_size).permute(1, 2, 0, 3)
    return by_layer.to(shape.device, shape.dtype).contiguous()


def read_tensors(directory: Path) -> Tensors:
    """Read an adapter's tensors as float32. Raises FailedPrecondition (ADAPTER_INVALID) where one is not finite."""
    try:
        tensors = load_file(directory / ADAPTER_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise _invalid("its weights cannot be read") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _invalid(f"tensor {key!r} is not finite")
    return {key: tensor.float() for key, tensor in tensors.items()}


def unsupported_adapter(what: str) -> Unimplemented:
    """Make the error of an adapter that needs what is not computed here."""
    return Unimplemented(f"The adapter uses {what}, which this engine does not compute yet.", reason="ADAPTER_NOT_SUPPORTED")


@dataclass(frozen=True)
class _Grouped:
    """An adapter's tensors: by layer and name in it, and the two that VeRA's layers share, by side. With the layers' places."""

    layers: Mapping[str, Tensors]
    shared: Tensors
    places: Places


def _group(tensors: Tensors, places: Places) -> _Grouped:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    shared = {}
    for key, tensor in tensors.items():
        match = TENSOR_KEY.match(key)
        if key in VERA_MATRICES:
            shared[VERA_MATRICES[key]] = tensor
        elif match is None or match["path"] not in places:
            raise _invalid(f"tensor {key!r} has no place in the base model")
        else:
            layers.setdefault(match["path"], {})[match["name"]] = tensor
    return _Grouped(layers, shared, places)


def _read_lora(config: Config, grouped: _Grouped) -> Mapping[str, Factors]:
    if grouped.shared:
        raise _invalid("it holds tensors of another method")
    return {path: _fold_lora(config, path, tensors) for path, tensors in grouped.layers.items()}


def _fold_lora(config: Config, path: str, tensors: Tensors) -> Factors:
    """Fold the scale, alpha / rank or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732), into B; peft has patterns by module."""
    down, up = _take(path, tensors, "lora_A", "lora_B")
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if isinstance(patterns, dict):
        alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), alpha)
    rank = max(1, down.shape[0])
    return down, up * (_finite(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _read_adalora(config: Config, grouped: _Grouped) -> Mapping[str, Factors]:
    """Fold the singular values into A and the scale into B (Zhang et al. 2023); ranks that were pruned are left out."""
    if grouped.shared:
        raise _invalid("it holds tensors of another method")
    alpha, initial_rank = _finite(config.get("lora_alpha")), _integer(config, "init_r")
    scale = (alpha if alpha > 0 else float(initial_rank)) / (initial_rank + ADALORA_EPSILON)
    folded = {}
    for path, tensors in grouped.layers.items():
        down, values, up = _take(path, tensors, "lora_A", "lora_E", "lora_B")
        if values.shape != (down.shape[0], 1) or up.dim() != 2 or up.shape[1] != down.shape[0]:
            raise _invalid(f"{path!r} has singular values {tuple(values.shape)} for matrices {tuple(down.shape)} and {tuple(up.shape)}")
        kept = values[:, 0] != 0
        if kept.any():
            folded[path] = ((down * values)[kept], up[:, kept] * scale)
    return folded


def _read_vera(config: Config, grouped: _Grouped) -> Mapping[str, Factors]:
    """Cut each layer's part out of the two shared matrices and scale it by the layer's vectors (Kopiczko et al. 2024)."""
    if grouped.shared.keys() != {"A", "B"}:
        raise unsupported_adapter("VeRA without its projections in the file")
    down, up = grouped.shared["A"], grouped.shared["B"]
    folded = {}
    for path, tensors in grouped.layers.items():
        by_output, by_rank = _take(path, tensors, "vera_lambda_b", "vera_lambda_d")
        projection, part = grouped.places[path]
        width, height = projection.in_features, projection.part_features[part]
        if by_rank.shape != down.shape[:1] or by_output.shape != (height,) or up.shape[0] < height or down.shape[1] < width:
            raise _invalid(f"{path!r} has vectors that do not fit the shared matrices {tuple(down.shape)} and {tuple(up.shape)}")
        folded[path] = (by_rank[:, None] * down[:, :width], by_output[:, None] * up[:height])
    return folded


LOW_RANK_READERS: Mapping[str, Callable[[Config, _Grouped], Mapping[str, Factors]]] = {
    "LORA": _read_lora,
    "ADALORA": _read_adalora,
    "VERA": _read_vera,
}


def _take(path: str, tensors: Tensors, *names: str) -> list[torch.Tensor]:
    if tensors.keys() != set(names):
        raise _invalid(f"{path!r} has {', '.join(sorted(tensors))} where {', '.join(names)} belong")
    return [tensors[name] for name in names]


def _check_factors(path: str, factors: Factors, projection: Projection, part: int) -> Factors:
    down, up = factors
    fits = down.dim() == up.dim() == 2 and down.shape[1] == projection.in_features and up.shape[0] == projection.part_features[part]
    if not fits or down.shape[0] != up.shape[1]:
        raise _invalid(f"{path!r} has matrices {tuple(down.shape)} and {tuple(up.shape)}, which the base model cannot take")
    return down, up


def _read_prompt(directory: Path) -> torch.Tensor:
    read_config(directory)
    tensors = read_tensors(directory)
    if tensors.keys() != {PROMPT_KEY} or tensors[PROMPT_KEY].dim() != 2 or not tensors[PROMPT_KEY].shape[0]:
        raise _invalid("it holds no virtual tokens, or more than them")
    return tensors[PROMPT_KEY]


def _integer(config: Config, name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise _invalid(f"{name} is not a number of ranks")
    return value


def _finite(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _invalid("its scale is not a number")
    return float(value)


def _invalid(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"The adapter cannot be loaded: {what}.", reason="ADAPTER_INVALID")
