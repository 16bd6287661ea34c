"""From an order to a run that can start: model, records and technique ready, memory tried, the last checkpoint restored."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from server.basemodels.errors import BaseModelUnavailable
from server.basemodels.loading import load_causal_model, load_tokenizer, preferred_dtype, read_context_tokens
from server.basemodels.sources import ResolvedModel
from server.childprocess import Signals
from server.datafiles.tokencache import TokenCache
from server.domain.events import ChildEvent, Started
from server.domain.orders import FineTuneOrder
from server.domain.techniques import QloraTechnique
from server.storage.artefacts import Artefact, ArtefactStore
from server.training.batches import BatchPlan, Examples, MicroBatch
from server.training.checkpoint import Position
from server.training.checkpoints import Checkpoints
from server.training.data import TrainingData, start_reading
from server.training.memory import settle_memory
from server.training.network import Network
from server.training.objectives.objective import choose_objective
from server.training.objectives.reference import compute_reference
from server.training.optimiser import make_optimiser
from server.training.sampling import make_sampler
from server.training.signals import check_signals
from server.training.state import MICRO_BATCH_TOKENS, Run
from server.training.techniques.apply import apply_technique
from server.training.techniques.qlora import hold_in_four_bits
from server.training.techniques.trained import Trained

# Records that a technique may look at before it starts.
PROBE_RECORDS = 64


@dataclass(frozen=True, slots=True)
class Attempt:
    """An order, with where this attempt at it reads and writes, whom it tells, and what it listens to."""

    order: FineTuneOrder
    store: ArtefactStore
    base: ResolvedModel
    emit: Callable[[ChildEvent], None]
    signals: Signals
    cache: TokenCache | None = None

    def tell(self, event: ChildEvent) -> None:
        """Emit what is said once in a job: an attempt that goes on from a checkpoint does not say it again."""
        if self.order.checkpoint_path is None:
            self.emit(event)

    def check(self) -> None:
        """Raise Stopped or PauseAsked if the job was told so."""
        check_signals(self.signals)


@dataclass(slots=True)
class Prepared:
    """What training starts from, and what finishing needs."""

    run: Run
    position: Position
    checkpoints: Checkpoints
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device


def prepare(attempt: Attempt) -> Prepared:
    """Make everything ready; between its parts it looks whether to stop or to pause. Raises JobFailure, Stopped, PauseAsked."""
    settings = attempt.order.spec.parameters
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = preferred_dtype(device)
    attempt.check()
    tokenizer = load_tokenizer(attempt.base.directory)
    model, data = _load(attempt, tokenizer, dtype, device)
    attempt.check()
    plan = BatchPlan.of(
        len(data.train), batch_size=settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps, seed=settings.seed
    )
    examples = Examples(data.train)
    trained = _apply_technique(attempt, model, tokenizer, examples, plan)
    optimiser = make_optimiser(trained.parameters.values(), settings)
    checkpoints = Checkpoints(attempt.order, attempt.store, trained, optimiser, _identify(attempt), attempt.emit)
    run = Run(
        network=Network(trained.model, packing=settings.packing),
        trained=trained,
        objective=choose_objective(settings),
        optimiser=optimiser,
        examples=examples,
        held_out=Examples(data.held_out),
        plan=plan,
        settings=settings,
        emit=attempt.emit,
        signals=attempt.signals,
        save=checkpoints.save,
        sampler=make_sampler(trained.model, tokenizer, settings, attempt.tell),
    )
    settle_memory(run)
    _add_references(run)
    torch.manual_seed(settings.seed)
    position = checkpoints.restore()
    attempt.emit(_describe_start(run, position))
    return Prepared(run, position, checkpoints, tokenizer, dtype, device)


def _load(
    attempt: Attempt, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, TrainingData]:
    """Load the model while the records are read in another thread."""
    order, directory = attempt.order, attempt.base.directory
    room = read_context_tokens(directory) - getattr(order.spec.technique, "virtual_tokens", 0)
    reading = start_reading(order, attempt.store.locate, attempt.cache, tokenizer, room, attempt.tell, attempt.check)
    try:
        technique = order.spec.technique
        held = hold_in_four_bits(technique) if isinstance(technique, QloraTechnique) else None
        model = load_causal_model(directory, dtype=dtype, device=device, held=held)
    except BaseException:
        reading.cancel()
        raise
    return model, reading.result()


def _apply_technique(
    attempt: Attempt, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, plan: BatchPlan
) -> Trained:
    """Make the model ready to be trained, from the weights of a version where the order names one (sealed by its manifest).

    Raises ArtefactInvalid, or JobFailure for a version of another shape.
    """
    order = attempt.order
    trained = apply_technique(
        model,
        order.spec.technique,
        seed=order.spec.parameters.seed,
        total_steps=plan.total_steps,
        probe=lambda: _probe(examples, plan, model.device),
        tokenizer=tokenizer,
        base_directory=attempt.base.directory,
    )
    if order.warm_start_path is not None:
        start = attempt.store.open(order.warm_start_path, order.warm_start_manifest_sha256)
        _check_same_base(start, attempt.base)
        trained.warm_start(start.directory)
    return trained


def _check_same_base(start: Artefact, base: ResolvedModel) -> None:
    """Refuse to go on from an adapter whose base was another: its weights would mean something else. A whole model needs no base."""
    revision = start.description.get("base_revision", base.revision)
    if start.description.get("kind") == "adapter" and revision != base.revision:
        message = f"{base.base_model} is not what it was when the version to start from was trained: its files have changed since."
        raise BaseModelUnavailable(message, reason="BASE_MODEL_CHANGED")


def _probe(examples: Examples, plan: BatchPlan, device: torch.device) -> list[MicroBatch]:
    """Give the first records that will be trained, for techniques that start from the data."""
    wanted = -(-PROBE_RECORDS // plan.batch_size)
    indices = {index for step in range(min(wanted, plan.total_steps)) for index in plan.records_of_step(step)}
    return [examples.lay_out(group).to(device) for group in examples.split(indices, MICRO_BATCH_TOKENS)]


def _add_references(run: Run) -> None:
    """Have the starting model judge all sequences, where the objective compares with it; before a checkpoint changes its weights."""
    if run.objective.needs_reference:
        run.examples, run.held_out = (
            compute_reference(run.network, examples, run.way.micro_batch_tokens, lambda: check_signals(run.signals))
            for examples in (run.examples, run.held_out)
        )


def _identify(attempt: Attempt) -> str:
    """Name what is trained: a checkpoint goes on only under the same specification, from the same weights. So may a retry of the job."""
    order = attempt.order
    start = order.warm_start_manifest_sha256 or ""
    named = (attempt.base.revision, start, sorted(asdict(order.spec).items(), key=str))
    return hashlib.sha256(repr(named).encode()).hexdigest()


def _describe_start(run: Run, position: Position) -> Started:
    return Started(
        total_steps=run.plan.total_steps,
        resumed_from_step=position.step,
        train_records=len(run.examples),
        eval_records=len(run.held_out),
        trainable_parameters=sum(parameter.numel() for parameter in run.trained.parameters.values()),
        total_parameters=sum(parameter.numel() for parameter in run.network.model.parameters()),
    )
