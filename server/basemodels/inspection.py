"""Looks into a model's directory before anything is loaded: safe weights, no code of its own. Knows no torch."""

import hashlib
import json
from pathlib import Path
from typing import cast

from server.basemodels.errors import BaseModelRefused

PICKLED_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
MAX_CONFIG_BYTES = 4 << 20  # a configuration is a few kilobytes; a bigger one is not read
SAMPLE_BYTES = 1 << 16
SAMPLES_PER_FILE = 16


def check_directory(directory: Path, base_model: str, *, may_ignore_code: bool = False) -> None:
    """Refuse a directory without safetensors weights, or with a configuration that asks for code of its own.

    With `may_ignore_code` such a configuration is accepted where transformers knows the architecture itself (falcon-7b on the
    hub still names code from before that): the code is neither fetched nor run. Raises BaseModelRefused.
    """
    names = {path.name for path in directory.iterdir()}
    if "config.json" not in names:
        raise BaseModelRefused(f"{base_model} has no config.json.")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = any(Path(name).suffix in PICKLED_SUFFIXES for name in names)
        why = (
            "has only pickled weights, which can run code when they are read; save them as safetensors"
            if pickled
            else "has no safetensors weights"
        )
        raise BaseModelRefused(f"{base_model} {why}.", reason="PICKLED_WEIGHTS" if pickled else None)
    for path in sorted(directory.rglob("*.json")):
        if path.name in ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
            _check_configuration(path, base_model, may_ignore_code)
        if path.name == "modules.json":
            _check_modules(path, base_model)


def check_cross_encoder(directory: Path, model: str) -> None:
    """Refuse what is no classifier of one label. Raises BaseModelRefused."""
    config = read_json(directory / "config.json", model) if directory.is_dir() else {}
    architectures = config.get("architectures") if isinstance(config, dict) else None
    labels = config.get("id2label") if isinstance(config, dict) else None
    if not str(architectures).endswith("ForSequenceClassification']") or not isinstance(labels, dict) or len(labels) != 1:
        raise BaseModelRefused(f"{model} is no cross-encoder: it gives no one score for a pair of texts.", reason="NOT_A_CROSS_ENCODER")


def _check_configuration(path: Path, base_model: str, may_ignore_code: bool) -> None:
    config = read_json(path, base_model)
    if not isinstance(config, dict) or not config.get("auto_map"):
        return
    if may_ignore_code and (path.name != "config.json" or is_known_architecture(str(config.get("model_type")))):
        return
    raise BaseModelRefused(f"{base_model} asks for code of its own (auto_map), which is never run here.", reason="REMOTE_CODE")


def _check_modules(path: Path, base_model: str) -> None:
    modules = read_json(path, base_model)
    types = [str(module.get("type")) for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    if not all(name.startswith("sentence_transformers.") for name in types):
        raise BaseModelRefused(f"{base_model} names a module of its own in modules.json, which is never run here.", reason="REMOTE_CODE")


def read_json(path: Path, base_model: str) -> object:
    """Read a configuration. Raises BaseModelRefused when it is too big or no JSON."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise BaseModelRefused(f"{base_model} has an implausibly big {path.name}.")
    try:
        return cast(object, json.loads(path.read_bytes()))
    except ValueError:
        raise BaseModelRefused(f"{base_model} has a {path.name} that is no JSON.") from None


def is_known_architecture(model_type: str) -> bool:
    """Tell whether transformers has this architecture itself."""
    # A late import: transformers takes a second, and only models from the hub need to be asked about.
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def fingerprint_directory(directory: Path) -> str:
    """Give a hash that changes when weights or configuration do.

    Reads small files whole and of each weights file its header's place and evenly spaced samples: a 140 GB model takes
    milliseconds. It tells versions apart; it is no proof against forgery.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".safetensors", ".json") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            step = max(1, (size - SAMPLE_BYTES) // (SAMPLES_PER_FILE - 1))
            for place in range(SAMPLES_PER_FILE):
                file.seek(place * step)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
