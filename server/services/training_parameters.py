"""The parameters of a training: every number checked, and what a caller left out filled in."""

import math
from dataclasses import dataclass

from server.domain.specs import (
    DEFAULT_PREFERENCE_STRENGTH,
    DEFAULT_SAMPLE_TOKENS,
    LossOn,
    Objective,
    OverlongPolicy,
    ParametersRequest,
    Scheduler,
    TrainingParameters,
)
from server.domain.techniques import Technique
from server.services.validation import MAX_CONTEXT_TOKENS, MAX_SEED, Violations

DEFAULT_EPOCHS = 3.0
DEFAULT_WARMUP_RATIO = 0.05
DEFAULT_SEQUENCE_TOKENS = 2_048
# A crash costs at most a fifth of the work, and on long jobs at most so many steps.
DEFAULT_CHECKPOINTS = 5
MAX_DEFAULT_CHECKPOINT_STEPS = 50
# Preference tuning moves a model that can already answer: the papers and TRL take a tenth and less of the supervised rate.
PREFERENCE_RATE_SHARE = 0.05
MAX_SAMPLE_PROMPTS = 8
MAX_SAMPLE_PROMPT_CHARACTERS = 4_000


@dataclass(frozen=True, slots=True)
class FineTuneDefaults:
    """What the deployment fills in: DEFAULT_BATCH_SIZE (records) and DEFAULT_LEARNING_RATE (None: the technique's own)."""

    batch_size: int
    learning_rate: float | None


def resolve_parameters(
    asked: ParametersRequest, defaults: FineTuneDefaults, technique: Technique, records: int, *, pairs: bool = False, held_out: bool = False
) -> TrainingParameters:
    """Fill in what was left out, for `records` training records; `pairs`: they are preferences, `held_out`: some are for evaluation."""
    objective = asked.objective or (Objective.DPO if pairs else Objective.SUPERVISED)
    batch_size = asked.batch_size or defaults.batch_size
    epochs = asked.epochs or DEFAULT_EPOCHS
    steps = asked.max_steps or max(1, math.ceil(records / batch_size * epochs))
    warmup_ratio = DEFAULT_WARMUP_RATIO if asked.warmup_ratio is None else asked.warmup_ratio
    every = max(1, min(MAX_DEFAULT_CHECKPOINT_STEPS, math.ceil(steps / DEFAULT_CHECKPOINTS)))
    return TrainingParameters(
        epochs=epochs,
        max_steps=asked.max_steps,
        batch_size=batch_size,
        learning_rate=asked.learning_rate or _default_learning_rate(defaults, technique, objective),
        scheduler=asked.scheduler or Scheduler.COSINE,
        warmup_steps=math.ceil(steps * warmup_ratio) if asked.warmup_steps is None else asked.warmup_steps,
        weight_decay=asked.weight_decay or 0.0,
        max_gradient_norm=asked.max_gradient_norm or 1.0,
        max_sequence_tokens=asked.max_sequence_tokens or DEFAULT_SEQUENCE_TOKENS,
        overlong_policy=asked.overlong_policy or OverlongPolicy.REJECT,
        loss_on=asked.loss_on or LossOn.ASSISTANT,
        seed=asked.seed or 0,
        evaluate_every_steps=asked.evaluate_every_steps or every,
        checkpoint_every_steps=asked.checkpoint_every_steps or every,
        packing=asked.packing is not False,
        objective=objective,
        preference_strength=asked.preference_strength or DEFAULT_PREFERENCE_STRENGTH,
        micro_batch_tokens=asked.micro_batch_tokens,
        gradient_checkpointing=asked.gradient_checkpointing,
        retry_out_of_memory=asked.retry_out_of_memory is not False,
        keep_best=held_out if asked.keep_best is None else asked.keep_best,
        early_stopping=asked.early_stopping,
        sample_prompts=asked.sample_prompts,
        sample_tokens=asked.sample_tokens or DEFAULT_SAMPLE_TOKENS,
    )


def _default_learning_rate(defaults: FineTuneDefaults, technique: Technique, objective: Objective) -> float:
    if defaults.learning_rate is not None:
        return defaults.learning_rate
    return technique.default_learning_rate * (PREFERENCE_RATE_SHARE if objective.needs_pairs else 1.0)


def check_parameters(found: Violations, asked: ParametersRequest) -> None:
    """Check every number of a training; what is left out is fine."""
    number, prefix = found.number, "parameters."
    number(f"{prefix}epochs", asked.epochs, 0, 1_000, above=True)
    number(f"{prefix}max_steps", asked.max_steps, 1, 10_000_000)
    number(f"{prefix}batch_size", asked.batch_size, 1, 4_096)
    number(f"{prefix}learning_rate", asked.learning_rate, 0, 1, above=True)
    number(f"{prefix}warmup_steps", asked.warmup_steps, 0, 1_000_000)
    number(f"{prefix}warmup_ratio", asked.warmup_ratio, 0, 1)
    if asked.warmup_steps is not None and asked.warmup_ratio is not None:
        found.add(f"{prefix}warmup_ratio", "give at most one of warmup_steps and warmup_ratio")
    if asked.epochs is not None and asked.max_steps is not None:
        found.add(f"{prefix}max_steps", "give at most one of epochs and max_steps")
    number(f"{prefix}weight_decay", asked.weight_decay, 0, 10)
    number(f"{prefix}max_gradient_norm", asked.max_gradient_norm, 0, 1_000_000, above=True)
    number(f"{prefix}max_sequence_tokens", asked.max_sequence_tokens, 8, MAX_CONTEXT_TOKENS)
    number(f"{prefix}seed", asked.seed, 0, MAX_SEED)
    number(f"{prefix}evaluation.every_steps", asked.evaluate_every_steps, 1, 1_000_000)
    number(f"{prefix}checkpointing.every_steps", asked.checkpoint_every_steps, 1, 1_000_000)
    number(f"{prefix}preference_strength", asked.preference_strength, 0, 100, above=True)
    number(f"{prefix}micro_batch_tokens", asked.micro_batch_tokens, 64, 1 << 20)
    number(f"{prefix}evaluation.sample_tokens", asked.sample_tokens, 1, 512)
    if asked.early_stopping is not None:
        number(f"{prefix}early_stopping.patience", asked.early_stopping.patience, 1, 100)
        number(f"{prefix}early_stopping.min_delta", asked.early_stopping.min_delta, 0, 1_000)
    if len(asked.sample_prompts) > MAX_SAMPLE_PROMPTS:
        found.add(f"{prefix}evaluation.sample_prompts", f"must be at most {MAX_SAMPLE_PROMPTS}, not {len(asked.sample_prompts)}")
    for place, prompt in enumerate(asked.sample_prompts[:MAX_SAMPLE_PROMPTS]):
        found.text(f"{prefix}evaluation.sample_prompts[{place}]", prompt, MAX_SAMPLE_PROMPT_CHARACTERS, least=1)
