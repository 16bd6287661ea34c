"""One fine-tuning job from order to result. Knows files, models and events; no database, no worker."""

import gc
import hashlib
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedTokenizerBase

from server.basemodels.errors import BaseModelRefused, BaseModelUnavailable
from server.basemodels.loading import count_context_tokens, load_causal_model, load_tokenizer, preferred_dtype
from server.basemodels.sources import BaseModelSource, ResolvedModel
from server.domain.errors import NotFound
from server.domain.events import CheckpointSaved, ChildEvent, Finalizing, ResultReady, Started, Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.orders import FineTuneOrder
from server.domain.specs import FineTuneSpec
from server.storage.artefacts import ArtefactInvalid, ArtefactStore, DiskFull
from server.training.adapters import add_lora, trainable_parameters
from server.training.artefact import describe_libraries, save_result, try_result
from server.training.batches import BatchPlan
from server.training.card import CardFacts, CardForm
from server.training.checkpoint import Position, load_checkpoint, save_checkpoint
from server.training.data import ReadResult, TokenizedRecords, check_records, read_records, split_held_out
from server.training.loop import Run, Stopped, make_optimiser, train
from server.training.network import Network

Emit = Callable[[ChildEvent], None]
ShouldStop = Callable[[], bool]


def run_fine_tune(order: FineTuneOrder, store: ArtefactStore, source: BaseModelSource, emit: Emit, should_stop: ShouldStop) -> None:
    """Do the job of the order; returns early, with nothing saved, once `should_stop` says so. Raises JobFailure for what cannot work."""
    began = time.perf_counter()
    try:
        base = source.resolve(order.spec.base_model)
        ready = _prepare(order, store, base, emit, should_stop)
        train(ready.run, ready.position)
        emit(Finalizing())
        emit(_finish(order, store, base, ready, began))
    except Stopped:
        return
    except (BaseModelUnavailable, BaseModelRefused, NotFound) as error:
        raise JobFailure(
            FailureReason.BASE_MODEL_UNAVAILABLE, str(error), "Choose another base model, or make this one loadable here."
        ) from error
    except DiskFull as error:
        raise JobFailure(FailureReason.DISK_FULL, str(error), "Free space under MODEL_STORAGE_PATH, then start the job again.") from error
    except ArtefactInvalid as error:
        raise JobFailure(FailureReason.ARTIFACT_INVALID, str(error), "Start the job again; look at the disk if this repeats.") from error


@dataclass(slots=True)
class _Ready:
    """What training starts from, and what finishing needs."""

    run: Run
    position: Position
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device


def _prepare(order: FineTuneOrder, store: ArtefactStore, base: ResolvedModel, emit: Emit, should_stop: ShouldStop) -> _Ready:
    spec = order.spec
    settings = spec.parameters
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = preferred_dtype(device)
    tokenizer = load_tokenizer(base.directory)
    model = load_causal_model(base.directory, dtype=dtype, device=device)
    max_tokens = min(settings.max_sequence_tokens, count_context_tokens(model))
    records, held_out = _read_data(order, store, tokenizer, max_tokens, emit)
    adapted = add_lora(model, spec.technique, seed=settings.seed)
    parameters = trainable_parameters(adapted)
    optimiser = make_optimiser(parameters.values(), settings)
    network = Network(adapted)
    plan = BatchPlan.of(
        len(records), batch_size=settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps, seed=settings.seed
    )
    job = _identify(order, base)

    def save(position: Position) -> None:
        path = f"{order.job_path}/checkpoint-{position.step}-{order.lease_epoch}"
        saved = save_checkpoint(store, path, parameters, optimiser, position, job)
        emit(CheckpointSaved(position.step, path, saved.size_bytes))

    run = Run(network, parameters, optimiser, records, held_out, plan, settings, emit, should_stop, save)
    position = _restore(order, store, run, job)
    emit(
        Started(
            total_steps=plan.total_steps,
            resumed_from_step=position.step,
            train_records=len(records),
            eval_records=len(held_out),
            trainable_parameters=sum(parameter.numel() for parameter in parameters.values()),
            total_parameters=sum(parameter.numel() for parameter in adapted.parameters()),
        )
    )
    return _Ready(run, position, tokenizer, dtype, device)


def _read_data(
    order: FineTuneOrder, store: ArtefactStore, tokenizer: PreTrainedTokenizerBase, max_tokens: int, emit: Emit
) -> tuple[TokenizedRecords, TokenizedRecords]:
    """Read the records to train and those held out."""
    settings = order.spec.parameters

    def read(path: str) -> TokenizedRecords:
        result = read_records(store.locate(path), tokenizer, max_tokens=max_tokens)
        check_records(result, policy=settings.overlong_policy, max_tokens=max_tokens)
        _warn(result, max_tokens, emit if order.checkpoint_path is None else _keep_quiet)
        return result.records

    records = read(order.dataset.path)
    if order.eval_dataset is not None:
        return records, read(order.eval_dataset.path)
    return split_held_out(records, order.spec.eval_fraction, settings.seed)


def _warn(result: ReadResult, max_tokens: int, emit: Emit) -> None:
    if result.invalid:
        first = result.invalid[0]
        emit(Warned("RECORDS_INVALID", f"{len(result.invalid)} records are left out; the first is line {first.line}: {first.message}"))
    if result.overlong_lines:
        emit(Warned("RECORDS_OVERLONG", f"{len(result.overlong_lines)} records with more than {max_tokens} tokens are left out."))


def _keep_quiet(event: ChildEvent) -> None:
    """Say nothing again that an earlier attempt has said."""


def _restore(order: FineTuneOrder, store: ArtefactStore, run: Run, job: str) -> Position:
    if order.checkpoint_path is None:
        return Position()
    return load_checkpoint(store, order.checkpoint_path, run.parameters, run.optimiser, job)


def _identify(order: FineTuneOrder, base: ResolvedModel) -> str:
    """Name what is trained: a checkpoint goes on only under the same specification and base weights."""
    spec: FineTuneSpec = order.spec
    return hashlib.sha256(repr((order.job_id, base.revision, sorted(asdict(spec).items(), key=str))).encode()).hexdigest()


def _finish(order: FineTuneOrder, store: ArtefactStore, base: ResolvedModel, ready: _Ready, began: float) -> ResultReady:
    run, position = ready.run, ready.position
    facts = {"technique": order.spec.technique.kind, "steps": position.step, "tokens": position.tokens, **describe_libraries()}
    card = _describe(order, base, run, position)
    artefact = save_result(store, order.artifact_path, run.network.model, ready.tokenizer, base, facts, card)
    # The trial loads the base model afresh: two of them need not fit into memory.
    del run
    del ready.run
    gc.collect()
    effect = try_result(artefact, base.directory, ready.dtype, ready.device)
    metrics = {"effect_largest_logit_difference": effect.largest, "effect_mean_logit_difference": effect.mean}
    if position.best_loss is not None:
        metrics |= {"best_eval_loss": position.best_loss, "best_eval_step": float(position.best_step)}
    return ResultReady(
        artifact_path=order.artifact_path,
        manifest_sha256=artefact.manifest_sha256,
        size_bytes=artefact.size_bytes,
        base_revision=base.revision,
        metrics=metrics,
        compute_seconds=time.perf_counter() - began,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        checkpoint_step=card.checkpoint_step,
        library_versions=card.library_versions,
        template_sha256=str(artefact.description["template_sha256"]),
    )


def _describe(order: FineTuneOrder, base: ResolvedModel, run: Run, position: Position) -> CardFacts:
    """Gather what the model card tells."""
    return CardFacts(
        form=CardForm.ADAPTER,
        spec=order.spec,
        job_id=order.job_id,
        base_revision=base.revision,
        checkpoint_step=position.step,
        train_records=len(run.records),
        eval_records=len(run.held_out),
        metrics={"best_eval_loss": position.best_loss} if position.best_loss is not None else {},
        library_versions={name.removesuffix("_version"): str(version) for name, version in describe_libraries().items()},
    )
