"""How a fine-tuning runs: techniques and parameters, as asked and as resolved."""

from modeltraining.v1 import fine_tuning_pb2, model_service_pb2, technique_pb2

from server.api.mappers.values import enum_from_proto, enum_to_proto
from server.domain.specs import (
    FineTuneSpec,
    LoraTechnique,
    LossOn,
    OverlongPolicy,
    ParametersRequest,
    Scheduler,
    TrainingParameters,
)
from server.services.validation import Violations

Parameters = fine_tuning_pb2.TrainingParameters

# Promised by the contract, not built yet: refused rather than passed over.
UNBUILT_TECHNIQUES = ("full", "qlora", "peft")
UNBUILT = "is not available in this version"


def technique_from_proto(message: model_service_pb2.CreateFineTunedModelRequest, found: Violations) -> LoraTechnique | None:
    """Read what is trained; None was left out."""
    chosen = message.WhichOneof("technique")
    if chosen is None:
        return None
    if chosen in UNBUILT_TECHNIQUES:
        found.add(chosen, f"{UNBUILT}; use lora")
        return None
    return lora_from_proto(message.lora)


def lora_from_proto(message: technique_pb2.LoraTechnique) -> LoraTechnique:
    """Read a LoRA adapter's shape; what was left out takes the domain's default."""
    default = LoraTechnique()
    return LoraTechnique(
        rank=message.rank if message.HasField("rank") else default.rank,
        alpha=message.alpha if message.HasField("alpha") else default.alpha,
        dropout=message.dropout if message.HasField("dropout") else default.dropout,
        target_modules=tuple(message.target_modules) or default.target_modules,
    )


def lora_to_proto(technique: LoraTechnique) -> technique_pb2.LoraTechnique:
    """Write a LoRA adapter's shape."""
    return technique_pb2.LoraTechnique(
        rank=technique.rank, alpha=technique.alpha, dropout=technique.dropout, target_modules=technique.target_modules
    )


def parameters_from_proto(message: Parameters, found: Violations) -> ParametersRequest:
    """Read how a training shall run; what was left out is None."""
    if message.packing:
        found.add("parameters.packing", UNBUILT)
    if message.HasField("early_stopping"):
        found.add("parameters.early_stopping", UNBUILT)
    policy = enum_from_proto(
        Parameters.OverlongPolicy, "OVERLONG_POLICY", message.overlong_policy, OverlongPolicy, found, "parameters.overlong_policy"
    )
    evaluation, checkpointing = message.evaluation, message.checkpointing
    return ParametersRequest(
        epochs=message.epochs if message.HasField("epochs") else None,
        max_steps=message.max_steps if message.HasField("max_steps") else None,
        batch_size=message.batch_size if message.HasField("batch_size") else None,
        learning_rate=message.learning_rate if message.HasField("learning_rate") else None,
        scheduler=enum_from_proto(Parameters.Scheduler, "SCHEDULER", message.scheduler, Scheduler, found, "parameters.scheduler"),
        warmup_steps=message.warmup_steps if message.HasField("warmup_steps") else None,
        warmup_ratio=message.warmup_ratio if message.HasField("warmup_ratio") else None,
        weight_decay=message.weight_decay if message.HasField("weight_decay") else None,
        max_gradient_norm=message.max_gradient_norm if message.HasField("max_gradient_norm") else None,
        max_sequence_tokens=message.max_sequence_tokens if message.HasField("max_sequence_tokens") else None,
        overlong_policy=policy,
        loss_on=enum_from_proto(Parameters.LossOn, "LOSS_ON", message.loss_on, LossOn, found, "parameters.loss_on"),
        seed=message.seed if message.HasField("seed") else None,
        evaluate_every_steps=evaluation.every_steps if evaluation.HasField("every_steps") else None,
        checkpoint_every_steps=checkpointing.every_steps if checkpointing.HasField("every_steps") else None,
    )


def parameters_to_proto(parameters: TrainingParameters) -> Parameters:
    """Write how a training runs: the one of epochs and max_steps that rules, and everything else."""
    return Parameters(
        epochs=parameters.epochs if parameters.max_steps is None else None,
        max_steps=parameters.max_steps,
        batch_size=parameters.batch_size,
        learning_rate=parameters.learning_rate,
        scheduler=enum_to_proto(Parameters.Scheduler, "SCHEDULER", parameters.scheduler),
        warmup_steps=parameters.warmup_steps,
        weight_decay=parameters.weight_decay,
        max_gradient_norm=parameters.max_gradient_norm,
        max_sequence_tokens=parameters.max_sequence_tokens,
        overlong_policy=enum_to_proto(Parameters.OverlongPolicy, "OVERLONG_POLICY", parameters.overlong_policy),
        packing=False,
        loss_on=enum_to_proto(Parameters.LossOn, "LOSS_ON", parameters.loss_on),
        seed=parameters.seed,
        evaluation=Parameters.Evaluation(every_steps=parameters.evaluate_every_steps),
        checkpointing=Parameters.Checkpointing(every_steps=parameters.checkpoint_every_steps),
    )


def fine_tune_to_proto(spec: FineTuneSpec) -> fine_tuning_pb2.FineTuneConfig:
    """Write a fine-tuning with everything filled in."""
    return fine_tuning_pb2.FineTuneConfig(
        base_model=spec.base_model,
        dataset_id=spec.dataset_id,
        dataset_sha256=spec.dataset_sha256,
        eval_dataset_id=spec.eval_dataset_id or "",
        eval_fraction=spec.eval_fraction or None,
        lora=lora_to_proto(spec.technique),
        parameters=parameters_to_proto(spec.parameters),
    )
