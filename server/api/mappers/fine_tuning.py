"""How a fine-tuning runs: its parameters, as asked and as resolved."""

from modeltraining.v1 import fine_tuning_pb2

from server.api.mappers.techniques import technique_to_proto
from server.api.mappers.values import enum_from_proto, enum_to_proto
from server.domain.specs import (
    DEFAULT_PATIENCE,
    EarlyStopping,
    FineTuneSpec,
    LossOn,
    Objective,
    OverlongPolicy,
    ParametersRequest,
    Scheduler,
    TrainingParameters,
    VersionReference,
)
from server.services.validation import Violations

Parameters = fine_tuning_pb2.TrainingParameters


def parameters_from_proto(message: Parameters, found: Violations) -> ParametersRequest:
    """Read how a training shall run; what was left out is None."""
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
        packing=message.packing if message.HasField("packing") else None,
        objective=enum_from_proto(Parameters.Objective, "OBJECTIVE", message.objective, Objective, found, "parameters.objective"),
        preference_strength=message.preference_strength if message.HasField("preference_strength") else None,
        micro_batch_tokens=message.micro_batch_tokens if message.HasField("micro_batch_tokens") else None,
        gradient_checkpointing=message.gradient_checkpointing if message.HasField("gradient_checkpointing") else None,
        retry_out_of_memory=message.retry_out_of_memory if message.HasField("retry_out_of_memory") else None,
        keep_best=checkpointing.keep_best if checkpointing.HasField("keep_best") else None,
        early_stopping=_early_stopping_from_proto(message.early_stopping) if message.HasField("early_stopping") else None,
        sample_prompts=tuple(evaluation.sample_prompts),
        sample_tokens=evaluation.sample_tokens if evaluation.HasField("sample_tokens") else None,
    )


def _early_stopping_from_proto(message: fine_tuning_pb2.TrainingParameters.EarlyStopping) -> EarlyStopping:
    return EarlyStopping(message.patience if message.HasField("patience") else DEFAULT_PATIENCE, message.min_delta)


def parameters_to_proto(parameters: TrainingParameters) -> Parameters:
    """Write how a training runs: the one of epochs and max_steps that rules, and everything else."""
    stopping = parameters.early_stopping
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
        packing=parameters.packing,
        loss_on=enum_to_proto(Parameters.LossOn, "LOSS_ON", parameters.loss_on),
        seed=parameters.seed,
        evaluation=Parameters.Evaluation(
            every_steps=parameters.evaluate_every_steps,
            sample_prompts=parameters.sample_prompts,
            sample_tokens=parameters.sample_tokens,
        ),
        early_stopping=Parameters.EarlyStopping(patience=stopping.patience, min_delta=stopping.min_delta) if stopping else None,
        checkpointing=Parameters.Checkpointing(every_steps=parameters.checkpoint_every_steps, keep_best=parameters.keep_best),
        objective=enum_to_proto(Parameters.Objective, "OBJECTIVE", parameters.objective),
        preference_strength=parameters.preference_strength if parameters.objective.needs_pairs else None,
        micro_batch_tokens=parameters.micro_batch_tokens,
        gradient_checkpointing=parameters.gradient_checkpointing,
        retry_out_of_memory=parameters.retry_out_of_memory,
    )


def version_from_proto(message: fine_tuning_pb2.ModelVersionReference) -> VersionReference:
    """Read which version is meant."""
    return VersionReference(message.model_id, message.version if message.HasField("version") else None)


def fine_tune_to_proto(spec: FineTuneSpec) -> fine_tuning_pb2.FineTuneConfig:
    """Write a fine-tuning with everything filled in."""
    start = spec.warm_start_from
    config = fine_tuning_pb2.FineTuneConfig(
        base_model=spec.base_model,
        dataset_id=spec.dataset_id,
        dataset_sha256=spec.dataset_sha256,
        eval_dataset_id=spec.eval_dataset_id or "",
        eval_fraction=spec.eval_fraction or None,
        parameters=parameters_to_proto(spec.parameters),
        warm_start_from=fine_tuning_pb2.ModelVersionReference(model_id=start.model_id, version=start.version) if start else None,
    )
    technique_to_proto(spec.technique, config)
    return config
