"""The shape of a model that lies here, from its configuration and the headers of its weights. Loads no weights, knows no torch."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import cast

from server.basemodels.errors import BaseModelRefused
from server.basemodels.inspection import read_json
from server.domain.shapes import Linear, ModelShape

MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
# The layers of a decoder are numbered in their tensors' names: model.layers.0.…, transformer.h.0.…
_EMBEDDING_PARTS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out", "wpe"})


def read_shape(directory: Path, base_model: str) -> ModelShape:
    """Read the shape of a decoder from `directory`. Raises BaseModelRefused where its files do not say it."""
    config = read_json(directory / "config.json", base_model)
    if not isinstance(config, dict):
        raise BaseModelRefused(f"{base_model} has a config.json that is no object.")
    text = config.get("text_config")
    numbers = cast(Mapping[str, object], {**config, **text} if isinstance(text, dict) else config)
    tensors = dict(_read_tensors(directory, base_model))
    hidden = _number(numbers, base_model, "hidden_size", "n_embd", "d_model")
    layers = _number(numbers, base_model, "num_hidden_layers", "n_layer", "n_layers")
    heads = _number(numbers, base_model, "num_attention_heads", "n_head", "n_heads")
    linears = _find_linears(tensors, layers)
    tied = bool(numbers.get("tie_word_embeddings", False)) or not any("lm_head" in name or "embed_out" in name for name in tensors)
    # A tied head may stand in the file all the same: it is the same weights.
    repeated = tied and any(name.startswith("lm_head") for name in tensors) and any("embed_tokens" in name for name in tensors)
    return ModelShape(
        parameter_count=sum(prod(shape) for name, shape in tensors.items() if not (repeated and name.startswith("lm_head"))),
        layer_count=layers,
        hidden_size=hidden,
        intermediate_size=_number(numbers, base_model, "intermediate_size", "ffn_hidden_size", "n_inner", default=4 * hidden),
        head_count=heads,
        key_head_count=_number(numbers, base_model, "num_key_value_heads", "num_kv_heads", default=heads),
        head_size=_number(numbers, base_model, "head_dim", default=hidden // heads),
        vocabulary_size=_number(numbers, base_model, "vocab_size"),
        tied_embeddings=tied,
        linears=linears,
    )


def _number(config: Mapping[str, object], base_model: str, *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    if default is None:
        raise BaseModelRefused(f"{base_model} has no {names[0]} in its config.json.")
    return default


def _read_tensors(directory: Path, base_model: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give name and shape of each tensor: the header of a safetensors file is its length (8 bytes) and as much JSON."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise BaseModelRefused(f"{base_model} has a damaged {path.name}.")
            try:
                header = json.loads(file.read(length))
                yield from ((name, tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BaseModelRefused(f"{base_model} has a damaged {path.name}.") from None


def _find_linears(tensors: Mapping[str, tuple[int, ...]], layers: int) -> tuple[Linear, ...]:
    """Find what stands in every layer: matrices [outputs, inputs] below a number in their names."""
    found: Counter[Linear] = Counter()
    for name, shape in tensors.items():
        parts = name.split(".")
        if len(shape) == 2 and parts[-1] == "weight" and any(part.isdigit() for part in parts) and not _EMBEDDING_PARTS & set(parts):
            found[Linear(parts[-2], shape[1], shape[0])] += 1
    return tuple(linear for linear, count in sorted(found.items(), key=repr) for _ in range(round(count / layers)))
