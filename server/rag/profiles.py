"""How an embedding model is to be used: from the catalogue where it is listed, else from its own Sentence Transformers files. No torch."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from server.domain.catalogue import EmbeddingModel, Pooling, Preparation, find_embedding_model
from server.domain.errors import FailedPrecondition

# Position tables of these begin behind the padding index, so that they read that many tokens less.
OFFSET_POSITION_TYPES = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"})
# What a model without any statement of its own reads: the position table of BERT.
FALLBACK_MAX_TOKENS = 512
# Settings of a Transformer module that change nothing for texts; any other means that its own library must run it.
_HARMLESS_SETTINGS = frozenset({"max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"})
_LEGACY_POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
_POOLINGS = {"cls": Pooling.CLS, "mean": Pooling.MEAN}


@dataclass(frozen=True, slots=True)
class EmbeddingProfile:
    """How texts become vectors. `pooling` None: only Sentence Transformers itself can run the model's modules.

    `transformer_path` is where the transformer lies below the model's directory; `max_tokens` counts special tokens and prefix.
    """

    embedding_model: str
    max_tokens: int
    pooling: Pooling | None
    query_prefix: str = ""
    passage_prefix: str = ""
    preparation: Preparation = Preparation.NONE
    transformer_path: str = ""


def refuse(embedding_model: str, why: str, reason: str = "EMBEDDING_MODEL_UNAVAILABLE") -> FailedPrecondition:
    """Make the error of an embedding model that cannot be used."""
    return FailedPrecondition(f"{embedding_model} {why}.", reason=reason, metadata={"embedding_model": embedding_model})


def canonical_name(embedding_model: str) -> str:
    """Give the hub name that an alias stands for; other names stay."""
    known = find_embedding_model(embedding_model)
    return known.embedding_model_id if known else embedding_model


def check_supported(embedding_model: str) -> None:
    """Raise FailedPrecondition for a listed model that this service cannot prepare texts for."""
    known = find_embedding_model(embedding_model)
    if known is not None and known.refusal:
        raise FailedPrecondition(known.refusal, reason="EMBEDDING_MODEL_UNSUPPORTED", metadata={"embedding_model": embedding_model})


def read_profile(embedding_model: str, directory: Path) -> EmbeddingProfile:
    """Read how to use the model in `directory`. Raises FailedPrecondition where its files make no sense or would run code."""
    try:
        own = _read_modules(embedding_model, directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(embedding_model, "has files that describe no embedding model") from error
    known = find_embedding_model(embedding_model)
    return own if known is None else _apply_catalogue(own, known)


def _apply_catalogue(own: EmbeddingProfile, known: EmbeddingModel) -> EmbeddingProfile:
    return replace(
        own,
        max_tokens=min(own.max_tokens, known.max_tokens),
        pooling=known.pooling,
        query_prefix=known.query_prefix,
        passage_prefix=known.passage_prefix,
        preparation=known.preparation,
    )


def _read_modules(embedding_model: str, directory: Path) -> EmbeddingProfile:
    if not (directory / "modules.json").is_file():
        # A bare transformer: Sentence Transformers takes the mean as well.
        return EmbeddingProfile(embedding_model, read_max_tokens(directory, {}), Pooling.MEAN)
    modules = cast(list[dict[str, str]], json.loads((directory / "modules.json").read_text("utf-8")))
    kinds = [_read_kind(embedding_model, module["type"]) for module in modules]
    for module in modules:
        _check_weights(embedding_model, directory / module["path"])
    transformer_path = modules[0]["path"]
    settings = _read_json(directory / transformer_path / "sentence_bert_config.json")
    simple = kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) and _is_harmless(settings)
    query_prefix, passage_prefix = _read_prompts(directory)
    return EmbeddingProfile(
        embedding_model,
        read_max_tokens(directory / transformer_path, settings),
        _read_pooling(directory / modules[1]["path"]) if simple else None,
        query_prefix,
        passage_prefix,
        transformer_path=transformer_path,
    )


def _read_kind(embedding_model: str, type_name: str) -> str:
    if not type_name.startswith("sentence_transformers."):
        raise refuse(embedding_model, "names a module of its own in modules.json, which is never run here", "REMOTE_CODE")
    return type_name.rpartition(".")[2]


def _check_weights(embedding_model: str, module: Path) -> None:
    if any(module.glob("pytorch_model*.bin")) and not any(module.glob("*.safetensors")):
        raise refuse(
            embedding_model, "has pickled weights, which can run code when they are read; save them as safetensors", "PICKLED_WEIGHTS"
        )


def _is_harmless(settings: dict[str, object]) -> bool:
    return set(settings) <= _HARMLESS_SETTINGS and not settings.get("do_lower_case") and settings.get("transformer_task") in (
        None, "feature-extraction",
    )  # fmt: skip


def _read_pooling(directory: Path) -> Pooling | None:
    config = _read_json(directory / "config.json")
    if config.get("include_prompt", True) is not True:
        return None
    legacy = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    modes = [_LEGACY_POOLING.get(key, key) for key in legacy] or [str(config.get("pooling_mode", "mean"))]
    return _POOLINGS.get(modes[0]) if len(modes) == 1 else None


def read_max_tokens(directory: Path, settings: dict[str, object]) -> int:
    """Give the smallest of what the model's files say that it reads."""
    config = _read_json(directory / "config.json")
    limits = [settings.get("max_seq_length"), _read_json(directory / "tokenizer_config.json").get("model_max_length")]
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int):
        padding = config.get("pad_token_id")
        behind_padding = isinstance(padding, int) and config.get("model_type") in OFFSET_POSITION_TYPES
        limits.append(positions - padding - 1 if behind_padding and isinstance(padding, int) else positions)
    # A tokenizer without a limit names a huge number.
    sensible = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1e9]
    return min(sensible, default=FALLBACK_MAX_TOKENS)


def _read_prompts(directory: Path) -> tuple[str, str]:
    config = _read_json(directory / "config_sentence_transformers.json")
    prompts = cast(dict[str, str], config.get("prompts") or {})
    default = prompts.get(str(config.get("default_prompt_name")), "")
    return prompts.get("query") or default, prompts.get("passage") or prompts.get("document") or default


def _read_json(path: Path) -> dict[str, object]:
    """Read a small configuration; a file that is not there says nothing."""
    return cast(dict[str, object], json.loads(path.read_text("utf-8"))) if path.is_file() else {}
