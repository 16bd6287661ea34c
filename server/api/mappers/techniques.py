"""Techniques of fine-tuning, one mapper pair each; what was left out takes the domain's default."""

from typing import TypeVar

from google.protobuf.message import Message
from modeltraining.v1 import fine_tuning_pb2, model_service_pb2, technique_pb2

from server.api.mappers.values import enum_from_proto, enum_to_proto
from server.domain.techniques import (
    AdaLora,
    ComputeType,
    FullTechnique,
    Ia3,
    LayerNormTuning,
    LoraInitialization,
    LoraTechnique,
    Oft,
    PeftMethod,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QloraTechnique,
    Quantization,
    Technique,
    Vera,
)
from server.services.validation import Violations

Lora, Qlora, Peft = technique_pb2.LoraTechnique, technique_pb2.QloraTechnique, technique_pb2.PeftTechnique
Value = TypeVar("Value")


def technique_from_proto(message: model_service_pb2.CreateFineTunedModelRequest, found: Violations) -> Technique | None:
    """Read what is trained; None was left out."""
    match message.WhichOneof("technique"):
        case "full":
            return FullTechnique()
        case "lora":
            return lora_from_proto(message.lora, found, "lora")
        case "qlora":
            return _qlora_from_proto(message.qlora, found)
        case "peft":
            return _peft_from_proto(message.peft, found)
        case _:
            return None


def lora_from_proto(message: technique_pb2.LoraTechnique, found: Violations, path: str) -> LoraTechnique:
    """Read a LoRA adapter's shape; `path` is where it stands in the request."""
    default = LoraTechnique()
    start = enum_from_proto(
        Lora.Initialization, "INITIALIZATION", message.initialization, LoraInitialization, found, f"{path}.initialization"
    )
    return LoraTechnique(
        rank=_given(message, "rank", message.rank, default.rank),
        alpha=_given(message, "alpha", message.alpha, default.alpha),
        dropout=_given(message, "dropout", message.dropout, default.dropout),
        target_modules=tuple(message.target_modules) or default.target_modules,
        rank_stabilized=message.rank_stabilized,
        dora=message.dora,
        initialization=start or default.initialization,
    )


def _qlora_from_proto(message: technique_pb2.QloraTechnique, found: Violations) -> QloraTechnique:
    held = enum_from_proto(Qlora.Quantization, "QUANTIZATION", message.quantization, Quantization, found, "qlora.quantization")
    return QloraTechnique(
        lora=lora_from_proto(message.lora, found, "qlora.lora"),
        quantization=held or Quantization.NF4,
        double_quantization=_given(message, "double_quantization", message.double_quantization, True),
        compute_type=enum_from_proto(Qlora.ComputeType, "COMPUTE_TYPE", message.compute_type, ComputeType, found, "qlora.compute_type"),
    )


def _peft_from_proto(message: technique_pb2.PeftTechnique, found: Violations) -> PeftMethod | None:
    match message.WhichOneof("method"):
        case "prompt_tuning":
            tokens = _given(message.prompt_tuning, "virtual_tokens", message.prompt_tuning.virtual_tokens, PromptTuning().virtual_tokens)
            return PromptTuning(tokens, message.prompt_tuning.initial_text)
        case "p_tuning":
            tuning = message.p_tuning
            width = _given(tuning, "encoder_hidden_size", tuning.encoder_hidden_size, None)
            return PTuning(_given(tuning, "virtual_tokens", tuning.virtual_tokens, PTuning().virtual_tokens), width)
        case "prefix_tuning":
            prefix = message.prefix_tuning
            return PrefixTuning(_given(prefix, "virtual_tokens", prefix.virtual_tokens, PrefixTuning().virtual_tokens))
        case "ia3":
            return Ia3()
        case "adalora":
            ada = message.adalora
            initial = _given(ada, "initial_rank", ada.initial_rank, AdaLora().initial_rank)
            return AdaLora(initial, _given(ada, "target_rank", ada.target_rank, min(initial, AdaLora().target_rank)))
        case "vera":
            return Vera(_given(message.vera, "rank", message.vera.rank, Vera().rank))
        case "oft":
            return Oft(_given(message.oft, "block_size", message.oft.block_size, Oft().block_size))
        case "layer_norm_tuning":
            return LayerNormTuning()
        case _:
            found.add("peft.method", "is required: name one method, for example prompt_tuning")
            return None


def _given(message: Message, field: str, value: Value, default: Value) -> Value:
    return value if message.HasField(field) else default


def technique_to_proto(technique: Technique, config: fine_tuning_pb2.FineTuneConfig) -> None:
    """Write a technique, everything filled in, into a configuration."""
    match technique:
        case FullTechnique():
            config.full.SetInParent()
        case LoraTechnique():
            config.lora.CopyFrom(lora_to_proto(technique))
        case QloraTechnique():
            config.qlora.CopyFrom(_qlora_to_proto(technique))
        case _:
            config.peft.CopyFrom(_peft_to_proto(technique))


def lora_to_proto(technique: LoraTechnique) -> technique_pb2.LoraTechnique:
    """Write a LoRA adapter's shape."""
    return Lora(
        rank=technique.rank,
        alpha=technique.alpha,
        dropout=technique.dropout,
        target_modules=technique.target_modules,
        rank_stabilized=technique.rank_stabilized,
        dora=technique.dora,
        initialization=enum_to_proto(Lora.Initialization, "INITIALIZATION", technique.initialization),
    )


def _qlora_to_proto(technique: QloraTechnique) -> technique_pb2.QloraTechnique:
    return Qlora(
        lora=lora_to_proto(technique.lora),
        quantization=enum_to_proto(Qlora.Quantization, "QUANTIZATION", technique.quantization),
        double_quantization=technique.double_quantization,
        compute_type=enum_to_proto(Qlora.ComputeType, "COMPUTE_TYPE", technique.compute_type),
    )


def _peft_to_proto(method: PeftMethod) -> technique_pb2.PeftTechnique:
    match method:
        case PromptTuning():
            tuning = Peft.PromptTuning(virtual_tokens=method.virtual_tokens, initial_text=method.initial_text)
            return Peft(prompt_tuning=tuning)
        case PTuning():
            return Peft(p_tuning=Peft.PTuning(virtual_tokens=method.virtual_tokens, encoder_hidden_size=method.encoder_hidden_size))
        case PrefixTuning():
            return Peft(prefix_tuning=Peft.PrefixTuning(virtual_tokens=method.virtual_tokens))
        case Ia3():
            return Peft(ia3=Peft.Ia3())
        case AdaLora():
            return Peft(adalora=Peft.AdaLora(initial_rank=method.initial_rank, target_rank=method.target_rank))
        case Vera():
            return Peft(vera=Peft.Vera(rank=method.rank))
        case Oft():
            return Peft(oft=Peft.Oft(block_size=method.block_size))
        case LayerNormTuning():
            return Peft(layer_norm_tuning=Peft.LayerNormTuning())
