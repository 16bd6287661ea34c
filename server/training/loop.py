"""The training loop, flat: records to micro-batches to gradients to a step, with what must be watched checked at each of them."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from server.domain.events import ChildEvent, Evaluated, StepDone, Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.specs import TrainingParameters
from server.training.batches import BatchPlan, MicroBatch, make_micro_batch, split_micro_batches
from server.training.checkpoint import Position
from server.training.data import TokenizedRecords
from server.training.network import Network
from server.training.schedule import learning_rate

# Measured on SmolLM2, two cores: fewer tokens leave matrix products too small, more leave the caches.
MICRO_BATCH_TOKENS = 1024
# Steps without a finite gradient, one after the other, after which training cannot recover.
MAX_SKIPPED_IN_A_ROW = 3
SPEED_WINDOW_STEPS = 20


class Stopped(Exception):
    """The job was told to stop; nothing is saved."""


@dataclass(slots=True)
class Run:
    """Everything that the loop works with."""

    network: Network
    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    records: TokenizedRecords
    held_out: TokenizedRecords
    plan: BatchPlan
    settings: TrainingParameters
    emit: Callable[[ChildEvent], None]
    should_stop: Callable[[], bool]
    save: Callable[[Position], None]
    micro_batch_tokens: int = MICRO_BATCH_TOKENS


def make_optimiser(parameters: Iterable[nn.Parameter], settings: TrainingParameters) -> torch.optim.Optimizer:
    """Make AdamW (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.999), fused=True)


def train(run: Run, position: Position) -> None:
    """Train from `position` to the end of the plan, moving it along. Raises Stopped, or JobFailure(LOSS_NOT_FINITE)."""
    clock = _Clock()
    if position.step == 0:
        _evaluate(run, position)
    while position.step < run.plan.total_steps:
        clock.start()
        rate = _set_learning_rate(run, position.step)
        batches = [batch.to(run.network.model.device) for batch in _batches_of_step(run, position.step)]
        loss = _accumulate_gradients(run, batches)
        norm = float(nn.utils.clip_grad_norm_(run.parameters.values(), run.settings.max_gradient_norm))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            run.optimiser.step()
        run.optimiser.zero_grad(set_to_none=True)
        tokens = sum(batch.token_count for batch in batches)
        position.step += 1
        position.tokens += tokens
        clock.stop(tokens)
        if finite:
            position.skipped_in_a_row = 0
            run.emit(_describe_step(run, position, clock, loss=loss, rate=rate, norm=norm, trained=sum(b.trained_count for b in batches)))
        else:
            _skip(run, position)
        last = position.step == run.plan.total_steps
        if last or position.step % run.settings.evaluate_every_steps == 0:
            _evaluate(run, position)
        if last or position.step % run.settings.checkpoint_every_steps == 0:
            run.save(position)


def _batches_of_step(run: Run, step: int) -> Iterator[MicroBatch]:
    for group in split_micro_batches(run.records, run.plan.records_of_step(step), run.micro_batch_tokens):
        yield make_micro_batch(run.records, group)


def _set_learning_rate(run: Run, step: int) -> float:
    settings = run.settings
    rate = learning_rate(
        step,
        total_steps=run.plan.total_steps,
        peak=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        scheduler=settings.scheduler,
    )
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    return rate


def _accumulate_gradients(run: Run, batches: list[MicroBatch]) -> float:
    """Add up the gradients of a step's micro-batches; give the mean loss over its trained tokens.

    Every part is divided by the whole step's trained tokens, so the split into micro-batches does not change the gradient.
    """
    trained = sum(batch.trained_count for batch in batches)
    run.network.model.train()
    total = 0.0
    for batch in batches:
        if run.should_stop():
            raise Stopped
        loss = run.network.sum_loss(batch) / trained
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += loss.item()
    return total


def _skip(run: Run, position: Position) -> None:
    position.skipped_in_a_row += 1
    if position.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise JobFailure(
            FailureReason.LOSS_NOT_FINITE,
            f"The loss or its gradient was no finite number in {position.skipped_in_a_row} steps in a row, up to step {position.step}.",
            "Lower learning_rate, or look for unusual records in the dataset.",
        )
    run.emit(Warned("LOSS_NOT_FINITE", f"Step {position.step} gave no finite loss or gradient; its update was left out."))


def _evaluate(run: Run, position: Position) -> None:
    """Give the mean loss over the held-out records' trained tokens."""
    if not len(run.held_out):
        return
    began = time.perf_counter()
    run.network.model.eval()
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for group in split_micro_batches(run.held_out, range(len(run.held_out)), run.micro_batch_tokens):
            if run.should_stop():
                raise Stopped
            batch = make_micro_batch(run.held_out, group).to(run.network.model.device)
            loss += float(run.network.sum_loss(batch))
            tokens += batch.trained_count
    mean = loss / tokens
    if not math.isfinite(mean):
        run.emit(Warned("LOSS_NOT_FINITE", f"The evaluation after step {position.step} gave no finite loss."))
        return
    best = position.best_loss is None or mean < position.best_loss
    if best:
        position.best_loss, position.best_step = mean, position.step
    run.emit(Evaluated(position.step, mean, tokens, records=len(run.held_out), duration_seconds=time.perf_counter() - began, best=best))


def _describe_step(run: Run, position: Position, clock: "_Clock", *, loss: float, rate: float, norm: float, trained: int) -> StepDone:
    return StepDone(
        step=position.step,
        total_steps=run.plan.total_steps,
        epoch=run.plan.epoch_after_step(position.step),
        loss=loss,
        learning_rate=rate,
        gradient_norm=norm,
        tokens=position.tokens,
        trained_tokens=trained,
        tokens_per_second=clock.tokens_per_second,
        eta_seconds=clock.seconds_per_step * (run.plan.total_steps - position.step),
        memory_bytes=read_memory_bytes(),
    )


def read_memory_bytes() -> int:
    """Give what this process holds now: device memory where it has a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


class _Clock:
    """Speed over the last steps, evaluations and checkpoints left out."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW_STEPS)
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, tokens: int) -> None:
        self._steps.append((time.perf_counter() - self._began, tokens))

    @property
    def seconds_per_step(self) -> float:
        return sum(seconds for seconds, _ in self._steps) / len(self._steps)

    @property
    def tokens_per_second(self) -> float:
        return sum(tokens for _, tokens in self._steps) / sum(seconds for seconds, _ in self._steps)
