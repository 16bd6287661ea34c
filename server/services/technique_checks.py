"""Checks of techniques, alone and together with parameters: a combination that makes no sense is refused, with the reason."""

import math

from server.domain.datasets import RecordKind
from server.domain.shapes import ModelShape
from server.domain.specs import Objective, ParametersRequest
from server.domain.techniques import (
    ALL_LINEAR,
    AdaLora,
    LoraInitialization,
    LoraTechnique,
    Oft,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QloraTechnique,
    Technique,
    Vera,
)
from server.services.validation import Violations

MAX_RANK = 1_024
MAX_TARGET_MODULES = 64
MAX_VIRTUAL_TOKENS = 512
MAX_INITIAL_TEXT_CHARACTERS = 10_000
# Embeddings and output heads of the families: no part of a decoder layer's shape, and allowed as targets.
OUTER_LAYERS = frozenset({"lm_head", "embed_out", "output", "embed_tokens", "word_embeddings", "wte"})


def check_technique(found: Violations, technique: Technique, parameters: ParametersRequest) -> None:
    """Note every bad number of a technique, and what does not go together."""
    match technique:
        case LoraTechnique():
            _check_lora(found, technique, "lora", quantized=False)
        case QloraTechnique():
            _check_lora(found, technique.lora, "qlora.lora", quantized=True)
        case PromptTuning():
            _check_virtual_tokens(found, technique.virtual_tokens, parameters, "peft.prompt_tuning.virtual_tokens")
            found.text("peft.prompt_tuning.initial_text", technique.initial_text, MAX_INITIAL_TEXT_CHARACTERS)
        case PTuning():
            _check_virtual_tokens(found, technique.virtual_tokens, parameters, "peft.p_tuning.virtual_tokens")
            found.number("peft.p_tuning.encoder_hidden_size", technique.encoder_hidden_size, 1, 16_384)
        case PrefixTuning():
            _check_virtual_tokens(found, technique.virtual_tokens, parameters, "peft.prefix_tuning.virtual_tokens")
        case AdaLora():
            found.number("peft.adalora.initial_rank", technique.initial_rank, 1, 512)
            found.number("peft.adalora.target_rank", technique.target_rank, 1, max(1, technique.initial_rank))
        case Vera():
            found.number("peft.vera.rank", technique.rank, 1, 4_096)
        case Oft():
            found.number("peft.oft.block_size", technique.block_size, 2, 1_024)


def check_targets(found: Violations, technique: Technique, shape: ModelShape) -> None:
    """Note every target module that the base model has no layer for. A target is a layer's name, or the end of its path."""
    lora, path = (technique.lora, "qlora.lora") if isinstance(technique, QloraTechnique) else (technique, "lora")
    if not isinstance(lora, LoraTechnique) or lora.target_modules == (ALL_LINEAR,) or not shape.linears:
        return
    names = [linear.name for linear in shape.linears]
    for place, target in enumerate(lora.target_modules[:MAX_TARGET_MODULES]):
        if target.rpartition(".")[2] not in OUTER_LAYERS.union(names):
            found.add(
                f"{path}.target_modules[{place}]", f"is no layer of the base model: choose of {', '.join(names)}, or {ALL_LINEAR} alone"
            )


def check_objective(found: Violations, objective: Objective | None, kind: RecordKind) -> None:
    """Note an objective that cannot learn from records of this kind."""
    if objective is None or kind is RecordKind.MIXED or objective.needs_pairs == (kind is RecordKind.PREFERENCE):
        return
    wanted = "preference pairs (prompt, chosen, rejected)" if objective.needs_pairs else "answers, not preference pairs"
    found.add("parameters.objective", f"{objective} learns from {wanted}; the records are of kind {kind}")


def _check_lora(found: Violations, technique: LoraTechnique, path: str, *, quantized: bool) -> None:
    found.number(f"{path}.rank", technique.rank, 1, MAX_RANK)
    found.number(f"{path}.alpha", technique.alpha, 0, 65_536, above=True)
    found.number(f"{path}.dropout", technique.dropout, 0, 0.9)
    if len(technique.target_modules) > MAX_TARGET_MODULES:
        found.add(f"{path}.target_modules", f"must be at most {MAX_TARGET_MODULES} names")
    for place, name in enumerate(technique.target_modules[:MAX_TARGET_MODULES]):
        found.text(f"{path}.target_modules[{place}]", name, 128, least=1)
    start = technique.initialization
    if start is LoraInitialization.LOFTQ and not quantized:
        found.add(f"{path}.initialization", "LOFTQ makes up for the error of 4-bit weights, and lora has none: choose qlora or another one")
    if quantized and start in (LoraInitialization.PISSA, LoraInitialization.OLORA):
        found.add(f"{path}.initialization", f"{start} changes the frozen weights, which qlora holds in 4 bits: choose LOFTQ or STANDARD")
    if technique.dora and start is not LoraInitialization.STANDARD:
        found.add(f"{path}.initialization", f"{start} and dora do not go together: leave one of them out")


def _check_virtual_tokens(found: Violations, tokens: int, parameters: ParametersRequest, path: str) -> None:
    most = parameters.max_sequence_tokens
    found.number(path, tokens, 1, MAX_VIRTUAL_TOKENS)
    if most is not None and math.isfinite(most) and tokens >= most:
        found.add(path, f"must be below parameters.max_sequence_tokens, {most:,}: the records need room too")
