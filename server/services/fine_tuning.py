"""Starting a fine-tuning: check everything at once, fill in what was left out, store model and job together."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from server.domain.datasets import Dataset, RecordKind
from server.domain.errors import FailedPrecondition, InvalidInput, NotFound
from server.domain.ids import JOB, MODEL, new_id
from server.domain.jobs import Job, JobKind, JobState
from server.domain.models import Model, ModelState, ModelType
from server.domain.records import RecordInvalid, parse_record
from server.domain.specs import (
    DEFAULT_PREFERENCE_STRENGTH,
    DEFAULT_SAMPLE_TOKENS,
    FineTuneSpec,
    LossOn,
    Objective,
    OverlongPolicy,
    ParametersRequest,
    Scheduler,
    TrainingParameters,
)
from server.domain.techniques import LoraTechnique, Technique
from server.services.datasets import Datasets
from server.services.idempotency import find_issued, hash_body, remember
from server.services.ports import BaseModels, Database, Transaction
from server.services.requests import Created, CreateFineTunedModel
from server.services.technique_checks import check_technique
from server.services.validation import MAX_CONTEXT_TOKENS, MAX_SEED, Violations

METHOD = "CreateFineTunedModel"
MAX_INLINE_RECORDS = 10_000
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


class FineTuning:
    """The use case CreateFineTunedModel."""

    def __init__(self, database: Database, datasets: Datasets, base_models: BaseModels, defaults: FineTuneDefaults) -> None:
        self._database = database
        self._datasets = datasets
        self._base_models = base_models
        self._defaults = defaults

    async def create(self, organization: str, request: CreateFineTunedModel) -> Created:
        """Store a model (or add to one) and the job that trains it. Raises InvalidInput naming every bad field."""
        body = hash_body(request)
        found = Violations()
        _check_plain(found, request)
        base_model = self._base_models.canonical_name(request.base_model)
        if base_model or not request.model_id:
            # May ask the hub, so it stands before the transaction.
            await check_base_model(self._base_models, found, "base_model", base_model)
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, METHOD, request.request_id, body):
                return Created(await transaction.models.get(issued["model_id"]), await transaction.jobs.get(issued["job_id"]))
            target = await _find_target(transaction, found, request.model_id, base_model)
            base_model = target.base_model if target else base_model
            dataset = await _find_dataset(transaction, found, "dataset_id", request.dataset_id)
            evaluation = await _find_dataset(transaction, found, "eval_dataset_id", request.eval_dataset_id)
            found.raise_if_any()
            if dataset is None:
                dataset = await self._store_inline(transaction, organization, request)
            spec = self._resolve(request, base_model, dataset, evaluation)
            model = target or _new_model(request, base_model)
            job = _new_job(model, spec)
            if request.validate_only:
                return Created(
                    model if target else replace(model, model_id=""), replace(job, job_id="", model_id=target.model_id if target else "")
                )
            if target is None:
                await transaction.models.insert(model)
            await transaction.jobs.insert(job)
            await remember(transaction, METHOD, request.request_id, body, {"model_id": model.model_id, "job_id": job.job_id})
            return Created(await transaction.models.get(model.model_id), await transaction.jobs.get(job.job_id))

    async def _store_inline(self, transaction: Transaction, organization: str, request: CreateFineTunedModel) -> Dataset | None:
        if request.validate_only:
            return None
        return await self._datasets.add_inline(
            transaction, organization, f"Records of {request.display_name}"[:200], request.inline_records
        )

    def _resolve(self, request: CreateFineTunedModel, base_model: str, dataset: Dataset | None, evaluation: Dataset | None) -> FineTuneSpec:
        fraction = request.eval_fraction or 0.0
        technique = request.technique or LoraTechnique()
        pairs = dataset is not None and dataset.record_kind is RecordKind.PREFERENCE
        records = dataset.record_count if dataset else len(request.inline_records)
        trained = max(1, records - math.floor(records * fraction))
        return FineTuneSpec(
            base_model=base_model,
            dataset_id=dataset.dataset_id if dataset else "",
            dataset_sha256=dataset.sha256 if dataset else "",
            technique=technique,
            parameters=resolve_parameters(
                request.parameters, self._defaults, technique, trained, pairs=pairs, held_out=evaluation is not None or fraction > 0
            ),
            eval_dataset_id=evaluation.dataset_id if evaluation else None,
            eval_fraction=fraction,
            warm_start_from=request.warm_start_from,
        )


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


async def check_base_model(base_models: BaseModels, found: Violations, field: str, base_model: str) -> None:
    """Note a model that is unknown, unsafe or cannot be had here now under `field`."""
    if not base_model:
        found.add(field, "is required")
        return
    found.text(field, base_model, 512)
    if found.found and found.found[-1].field == field:
        return
    try:
        await asyncio.to_thread(base_models.check, base_model)
    except (NotFound, InvalidInput, FailedPrecondition) as error:
        found.add(field, str(error))


def _check_plain(found: Violations, request: CreateFineTunedModel) -> None:
    found.name(request.display_name, request.description, request.request_id)
    found.labels(request.labels)
    if bool(request.dataset_id) == bool(request.inline_records):
        found.add("dataset_id", "give exactly one of dataset_id and inline_records")
    if request.eval_dataset_id and request.eval_fraction:
        found.add("eval_fraction", "give at most one of eval_dataset_id and eval_fraction")
    found.number("eval_fraction", request.eval_fraction, 0, 0.5)
    if request.parameters.early_stopping is not None and not (request.eval_dataset_id or request.eval_fraction):
        found.add("parameters.early_stopping", "needs held-out records: give eval_dataset_id or eval_fraction")
    if request.parameters.keep_best and not (request.eval_dataset_id or request.eval_fraction):
        found.add("parameters.checkpointing.keep_best", "needs held-out records: give eval_dataset_id or eval_fraction")
    if request.technique:
        check_technique(found, request.technique, request.parameters)
    check_parameters(found, request.parameters)
    _check_inline(found, request.inline_records)


def _check_inline(found: Violations, lines: Sequence[bytes]) -> None:
    if len(lines) > MAX_INLINE_RECORDS:
        found.add("inline_records", f"must be at most {MAX_INLINE_RECORDS:,}, not {len(lines):,}: upload a dataset instead")
        return
    for place, line in enumerate(lines):
        try:
            parse_record(line)
        except RecordInvalid as error:
            found.add(f"inline_records[{place}]", f"{error.code}: {error}")


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


async def _find_target(transaction: Transaction, found: Violations, model_id: str, base_model: str) -> Model | None:
    """Find the model that gets another version, if one is named."""
    if not model_id:
        return None
    try:
        model = await transaction.models.get(model_id, lock=True)
    except NotFound as error:
        found.add("model_id", str(error))
        return None
    if model.type is not ModelType.FINE_TUNED:
        found.add("model_id", "is not a fine-tuned model: versions can be added to those only")
    if base_model and base_model != model.base_model:
        found.add("base_model", f"must be left out or be the model's own, {model.base_model}")
    if model.state is ModelState.DELETING:
        raise FailedPrecondition("The model is being deleted.", reason="MODEL_DELETING", metadata={"model_id": model.model_id})
    return model


async def _find_dataset(transaction: Transaction, found: Violations, field: str, dataset_id: str) -> Dataset | None:
    if not dataset_id:
        return None
    try:
        return await transaction.datasets.get(dataset_id)
    except NotFound as error:
        found.add(field, str(error))
        return None


def _new_model(request: CreateFineTunedModel, base_model: str) -> Model:
    now = datetime.now(UTC)
    return Model(
        model_id=new_id(MODEL),
        type=ModelType.FINE_TUNED,
        display_name=request.display_name,
        description=request.description,
        labels=dict(request.labels),
        state=ModelState.CREATING,
        base_model=base_model,
        technique=(request.technique or LoraTechnique()).family,
        create_time=now,
        update_time=now,
    )


def _new_job(model: Model, spec: FineTuneSpec) -> Job:
    now = datetime.now(UTC)
    return Job(
        job_id=new_id(JOB),
        kind=JobKind.FINE_TUNE,
        model_id=model.model_id,
        state=JobState.QUEUED,
        spec=spec,
        create_time=now,
        update_time=now,
    )
