"""From an order to a run that can start: model, records and technique ready, memory tried, the last checkpoint restored."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedTokenizerBase

from server.basemodels.loading import count_context_tokens, load_causal_model, load_tokenizer, preferred_dtype
from server.basemodels.sources import ResolvedModel
from server.childprocess import Signals
from server.domain.events import ChildEvent, Started, Warned
from server.domain.orders import FineTuneOrder
from server.storage.artefacts import ArtefactStore
from server.training.adapters import add_lora
from server.training.batches import BatchPlan, Examples
from server.training.checkpoint import Position
from server.training.checkpoints import Checkpoints
from server.training.data import ReadResult, TokenizedRecords, check_records, read_records, split_held_out
from server.training.loop import Run, make_optimiser
from server.training.memory import settle_memory
from server.training.network import Network
from server.training.objectives.objective import choose_objective
from server.training.objectives.reference import compute_reference
from server.training.sampling import make_sampler
from server.training.signals import check_signals
from server.training.techniques.trained import Trained

Emit = Callable[[ChildEvent], None]


@dataclass(slots=True)
class Prepared:
    """What training starts from, and what finishing needs."""

    run: Run
    position: Position
    checkpoints: Checkpoints
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device


def prepare(order: FineTuneOrder, store: ArtefactStore, base: ResolvedModel, emit: Emit, signals: Signals) -> Prepared:
    """Make everything ready; between its parts it looks whether to stop or to pause. Raises JobFailure, Stopped, PauseAsked."""
    settings = order.spec.parameters
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = preferred_dtype(device)
    check_signals(signals)
    tokenizer = load_tokenizer(base.directory)
    model = load_causal_model(base.directory, dtype=dtype, device=device)
    check_signals(signals)
    # What an attempt before this one has said is not said again.
    tell = emit if order.checkpoint_path is None else _keep_quiet
    records, held_out = _read_data(order, store, tokenizer, min(settings.max_sequence_tokens, count_context_tokens(model)), tell)
    check_signals(signals)
    plan = BatchPlan.of(
        len(records), batch_size=settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps, seed=settings.seed
    )
    trained = Trained(add_lora(model, order.spec.technique, seed=settings.seed))
    _warm_start(order, store, trained)
    optimiser = make_optimiser(trained.parameters.values(), settings)
    checkpoints = Checkpoints(order, store, trained, optimiser, _identify(order, base), emit)
    run = Run(
        network=Network(trained.model, packing=settings.packing),
        trained=trained,
        objective=choose_objective(settings),
        optimiser=optimiser,
        examples=Examples(records),
        held_out=Examples(held_out),
        plan=plan,
        settings=settings,
        emit=emit,
        signals=signals,
        save=checkpoints.save,
        sampler=make_sampler(trained.model, tokenizer, settings, tell),
    )
    settle_memory(run)
    _add_references(run)
    torch.manual_seed(settings.seed)
    position = checkpoints.restore()
    emit(_describe_start(run, position))
    return Prepared(run, position, checkpoints, tokenizer, dtype, device)


def _keep_quiet(event: ChildEvent) -> None:
    """Say nothing again that an earlier attempt has said."""


def _read_data(
    order: FineTuneOrder, store: ArtefactStore, tokenizer: PreTrainedTokenizerBase, max_tokens: int, emit: Emit
) -> tuple[TokenizedRecords, TokenizedRecords]:
    """Read the records to train and those held out."""
    settings = order.spec.parameters

    def read(path: str) -> TokenizedRecords:
        result = read_records(store.locate(path), tokenizer, max_tokens=max_tokens)
        check_records(result, policy=settings.overlong_policy, max_tokens=max_tokens)
        _warn(result, max_tokens, emit)
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


def _warm_start(order: FineTuneOrder, store: ArtefactStore, trained: Trained) -> None:
    """Start from the weights of a version, sealed by its manifest. Raises ArtefactInvalid, JobFailure for one of another shape."""
    if order.warm_start_path is not None:
        trained.warm_start(store.open(order.warm_start_path, order.warm_start_manifest_sha256).directory)


def _add_references(run: Run) -> None:
    """Have the starting model judge all sequences, where the objective compares with it; before a checkpoint changes its weights."""
    if run.objective.needs_reference:
        run.examples, run.held_out = (
            compute_reference(run.network, examples, run.micro_batch_tokens, lambda: check_signals(run.signals))
            for examples in (run.examples, run.held_out)
        )


def _identify(order: FineTuneOrder, base: ResolvedModel) -> str:
    """Name what is trained: a checkpoint goes on only under the same specification, from the same weights. A retry of the job may."""
    start = order.warm_start_manifest_sha256 or ""
    return hashlib.sha256(repr((base.revision, start, sorted(asdict(order.spec).items(), key=str))).encode()).hexdigest()


def _describe_start(run: Run, position: Position) -> Started:
    return Started(
        total_steps=run.plan.total_steps,
        resumed_from_step=position.step,
        train_records=len(run.examples),
        eval_records=len(run.held_out),
        trainable_parameters=sum(parameter.numel() for parameter in run.trained.parameters.values()),
        total_parameters=sum(parameter.numel() for parameter in run.network.model.parameters()),
    )
