"""Starting a fine-tuning: check everything at once, fill in what was left out, store model and job together."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from server.domain.catalogue import find_base_model
from server.domain.datasets import Dataset, RecordKind
from server.domain.errors import FailedPrecondition, InvalidInput, NotFound
from server.domain.estimates import Estimate
from server.domain.ids import JOB, MODEL, new_id
from server.domain.jobs import Job, JobKind, JobState
from server.domain.models import Model, ModelState, ModelType
from server.domain.record_forms import parse_record
from server.domain.records import RecordInvalid
from server.domain.specs import FineTuneSpec
from server.domain.techniques import LoraTechnique
from server.services.datasets import Datasets
from server.services.estimating import Estimator, refuse_if_too_big
from server.services.idempotency import find_issued, hash_body, remember
from server.services.model_ports import BaseModels
from server.services.ports import Database, Transaction
from server.services.record_lengths import InlineRecords
from server.services.requests import Created, CreateFineTunedModel
from server.services.technique_checks import check_objective, check_targets, check_technique
from server.services.training_parameters import FineTuneDefaults, check_parameters, resolve_parameters
from server.services.validation import Violations
from server.services.warm_start import find_warm_start, hold_warm_start

METHOD = "CreateFineTunedModel"
MAX_INLINE_RECORDS = 10_000
# How many finished trainings tell how fast the next one will be.
SPEEDS_READ = 20


@dataclass(frozen=True, slots=True)
class _Plan:
    """A checked request with everything filled in. Of inline records the specification does not name the dataset yet."""

    target: Model | None
    spec: FineTuneSpec
    estimate: Estimate | None


class FineTuning:
    """The use cases CreateFineTunedModel and EstimateFineTune."""

    def __init__(
        self, database: Database, datasets: Datasets, base_models: BaseModels, defaults: FineTuneDefaults, estimator: Estimator
    ) -> None:
        self._database = database
        self._datasets = datasets
        self._base_models = base_models
        self._defaults = defaults
        self._estimator = estimator

    async def create(self, organization: str, request: CreateFineTunedModel) -> Created:
        """Store a model (or add to one) and the job that trains it.

        Raises InvalidInput naming every bad field, FailedPrecondition (DOES_NOT_FIT) for what no memory here suffices for.
        """
        body = hash_body(request)
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, METHOD, request.request_id, body):
                return await _read_created(transaction, issued)
        plan = await self._plan(organization, request)
        if plan.estimate:
            refuse_if_too_big(plan.estimate)
        if request.validate_only:
            return _preview(plan, request)
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, METHOD, request.request_id, body):
                return await _read_created(transaction, issued)
            spec = plan.spec
            if not spec.dataset_id:
                name = f"Records of {request.display_name}"[:200]
                stored = await self._datasets.add_inline(transaction, organization, name, request.inline_records)
                spec = replace(spec, dataset_id=stored.dataset_id, dataset_sha256=stored.sha256)
            # Locked, and looked at again: the plan was made without holding anything.
            await hold_warm_start(transaction, spec.warm_start_from, plan.target.model_id if plan.target else None)
            model = await _lock_target(transaction, plan.target) if plan.target else _new_model(request, spec)
            if plan.target is None:
                await transaction.models.insert(model)
            job = _new_job(model.model_id, spec, plan.estimate)
            await transaction.jobs.insert(job)
            await remember(transaction, METHOD, request.request_id, body, {"model_id": model.model_id, "job_id": job.job_id})
            return await _read_created(transaction, {"model_id": model.model_id, "job_id": job.job_id})

    async def estimate(self, organization: str, request: CreateFineTunedModel) -> Estimate:
        """Say what a fine-tuning would need. Raises InvalidInput, FailedPrecondition (NO_ESTIMATE) for a base model never seen here."""
        named = request if request.display_name or request.model_id else replace(request, display_name="Estimate")
        known = find_base_model(request.base_model)
        plan = await self._plan(organization, named, must_load=known is None)
        if plan.estimate is None:
            raise FailedPrecondition(
                f"Nothing is known of {plan.spec.base_model} before its files are here: ask it once, or choose a model of the catalogue.",
                reason="NO_ESTIMATE",
            )
        return plan.estimate

    async def _plan(self, organization: str, request: CreateFineTunedModel, *, must_load: bool = True) -> _Plan:
        """Check everything and fill in what was left out; stores nothing. `must_load`: the base model must be loadable here now."""
        found = Violations()
        _check_plain(found, request)
        base_model = self._base_models.canonical_name(request.base_model)
        if must_load and (base_model or not request.model_id):
            # May ask the hub, so it stands before the transaction.
            await check_base_model(self._base_models, found, "base_model", base_model)
        async with self._database.transaction(organization) as transaction:
            target = await _find_target(transaction, found, request.model_id, base_model)
            base_model = target.base_model if target else base_model
            dataset = await _find_dataset(transaction, found, "dataset_id", request.dataset_id)
            evaluation = await _find_dataset(transaction, found, "eval_dataset_id", request.eval_dataset_id)
            technique = request.technique or LoraTechnique()
            start = await find_warm_start(transaction, found, request.warm_start_from, base_model, technique)
            speeds = await transaction.jobs.list_speeds(SPEEDS_READ)
        found.raise_if_any()
        check_objective(found, request.parameters.objective, _find_kind(dataset, request))
        if shape := await asyncio.to_thread(self._base_models.read_shape, base_model):
            check_targets(found, technique, shape)
        found.raise_if_any()
        spec = replace(self._resolve(request, base_model, dataset, evaluation), warm_start_from=start)
        source = dataset or InlineRecords(request.inline_records)
        return _Plan(target, spec, await self._estimator.estimate(spec, source, speeds))

    def _resolve(self, request: CreateFineTunedModel, base_model: str, dataset: Dataset | None, evaluation: Dataset | None) -> FineTuneSpec:
        fraction = request.eval_fraction or 0.0
        technique = request.technique or LoraTechnique()
        pairs = _find_kind(dataset, request) is RecordKind.PREFERENCE
        records = dataset.record_count if dataset else len(request.inline_records)
        trained = max(1, records - math.floor(records * fraction))
        held_out = evaluation is not None or fraction > 0
        return FineTuneSpec(
            base_model=base_model,
            dataset_id=dataset.dataset_id if dataset else "",
            dataset_sha256=dataset.sha256 if dataset else "",
            technique=technique,
            parameters=resolve_parameters(request.parameters, self._defaults, technique, trained, pairs=pairs, held_out=held_out),
            eval_dataset_id=evaluation.dataset_id if evaluation else None,
            eval_fraction=fraction,
        )


def _find_kind(dataset: Dataset | None, request: CreateFineTunedModel) -> RecordKind:
    return dataset.record_kind if dataset else parse_record(request.inline_records[0]).kind


async def _read_created(transaction: Transaction, ids: Mapping[str, str]) -> Created:
    return Created(await transaction.models.get(ids["model_id"]), await transaction.jobs.get(ids["job_id"]))


async def _lock_target(transaction: Transaction, target: Model) -> Model:
    model = await transaction.models.get(target.model_id, lock=True)
    if model.state is ModelState.DELETING:
        raise FailedPrecondition("The model is being deleted.", reason="MODEL_DELETING", metadata={"model_id": model.model_id})
    return model


def _preview(plan: _Plan, request: CreateFineTunedModel) -> Created:
    """Show what would be created, without ids that nobody could use."""
    model = plan.target or replace(_new_model(request, plan.spec), model_id="")
    return Created(model, replace(_new_job(model.model_id, plan.spec, plan.estimate), job_id=""))


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
    # Another version needs no name: the model has one.
    found.name(request.display_name or ("-" if request.model_id else ""), request.description, request.request_id)
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
            if not parse_record(line).kind.can_be_learnt:
                found.add(f"inline_records[{place}]", "is a query to evaluate retrieval by: nothing can be learnt from it")
        except RecordInvalid as error:
            found.add(f"inline_records[{place}]", f"{error.code}: {error}")


async def _find_target(transaction: Transaction, found: Violations, model_id: str, base_model: str) -> Model | None:
    """Find the model that gets another version, if one is named."""
    if not model_id:
        return None
    try:
        model = await transaction.models.get(model_id)
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
        dataset = await transaction.datasets.get(dataset_id)
    except NotFound as error:
        found.add(field, str(error))
        return None
    if not dataset.record_kind.can_be_learnt:
        what = "queries to evaluate retrieval by" if dataset.record_kind is RecordKind.RETRIEVAL else "prompts without answers"
        found.add(field, f"holds {what}: nothing can be learnt from them")
    return dataset


def _new_model(request: CreateFineTunedModel, spec: FineTuneSpec) -> Model:
    now = datetime.now(UTC)
    return Model(
        model_id=new_id(MODEL),
        type=ModelType.FINE_TUNED,
        display_name=request.display_name,
        description=request.description,
        labels=dict(request.labels),
        state=ModelState.CREATING,
        base_model=spec.base_model,
        technique=spec.technique.family,
        create_time=now,
        update_time=now,
    )


def _new_job(model_id: str, spec: FineTuneSpec, estimate: Estimate | None) -> Job:
    now = datetime.now(UTC)
    return Job(
        job_id=new_id(JOB),
        kind=JobKind.FINE_TUNE,
        model_id=model_id,
        state=JobState.QUEUED,
        spec=spec,
        create_time=now,
        update_time=now,
        estimate=estimate,
    )
