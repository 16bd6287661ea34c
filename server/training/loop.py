"""The training loop, flat: records to micro-batches to gradients to a step, with what must be watched checked at each of them."""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from torch import nn

from server.domain.events import Evaluated, Sampled, StepDone, Warned
from server.domain.jobs import FailureReason, JobFailure
from server.training.batches import MicroBatch
from server.training.checkpoint import Position
from server.training.evaluation import Evaluation, evaluate, is_patience_over, note_loss
from server.training.memory import compute_in_memory, trim_heap
from server.training.schedule import learning_rate
from server.training.signals import PauseAsked, check_signals, check_stop
from server.training.state import Run

# Steps without a finite gradient, one after the other, after which training cannot recover.
MAX_SKIPPED_IN_A_ROW = 3
SPEED_WINDOW_STEPS = 20


def train(run: Run, position: Position) -> None:
    """Train from `position` to the end of the plan, moving it along.

    Raises Stopped, PauseAsked (the state is saved then), or JobFailure(LOSS_NOT_FINITE).
    """
    try:
        _train(run, position)
    except PauseAsked:
        run.save(position, False)
        raise


def _train(run: Run, position: Position) -> None:
    clock = _Clock()
    _evaluate_if_due(run, position)
    while not _is_over(run, position):
        check_signals(run.signals)
        clock.start()
        rate = _set_learning_rate(run, position.step)
        gradients = compute_in_memory(run, partial(_accumulate_gradients, run, position.step))
        norm = float(nn.utils.clip_grad_norm_(run.trained.parameters.values(), run.settings.max_gradient_norm))
        finite = math.isfinite(gradients.loss) and math.isfinite(norm)
        if finite:
            run.optimiser.step()
            run.trained.after_step(position.step + 1)
        run.optimiser.zero_grad(set_to_none=True)
        trim_heap()
        position.step += 1
        position.tokens += gradients.tokens
        position.trained_tokens += gradients.trained_tokens
        clock.stop(gradients.tokens)
        if finite:
            position.skipped_in_a_row, position.loss = 0, gradients.loss
            run.emit(_describe_step(run, position, clock, gradients, rate=rate, norm=norm))
        else:
            _skip(run, position)
        best = _evaluate_if_due(run, position) and run.settings.keep_best
        if best or _is_over(run, position) or position.step % run.settings.checkpoint_every_steps == 0:
            run.save(position, best)


def _is_over(run: Run, position: Position) -> bool:
    return position.step >= run.plan.total_steps or is_patience_over(run.settings, position)


def _batches_of_step(run: Run, step: int) -> Iterator[MicroBatch]:
    for group in run.examples.split(run.plan.records_of_step(step), run.way.micro_batch_tokens):
        yield run.examples.lay_out(group)


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


@dataclass(frozen=True, slots=True)
class _Gradients:
    """What a step's micro-batches gave, beside the gradients themselves."""

    loss: float
    tokens: int
    trained_tokens: int


def _accumulate_gradients(run: Run, step: int) -> _Gradients:
    """Add up the gradients of a step's micro-batches; give the mean of the objective's loss.

    Every part is divided by the whole step's count, so the split into micro-batches does not change the gradient.
    """
    batches = list(_batches_of_step(run, step))
    count = sum(run.objective.count(batch) for batch in batches)
    run.network.model.train()
    total = 0.0
    for batch in batches:
        check_stop(run.signals)
        loss = run.objective.sum_loss(run.network, batch.to(run.network.model.device)) / count
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += loss.item()
        if run.trained.kind == "model":  # the first gradients of all weights lie among activations, and keep what these leave: 0.2 GB
            trim_heap()
    penalty = run.trained.penalty()
    if penalty is not None:
        penalty.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return _Gradients(total, sum(batch.token_count for batch in batches), sum(batch.trained_count for batch in batches))


def _skip(run: Run, position: Position) -> None:
    position.skipped_in_a_row += 1
    if position.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise JobFailure(
            FailureReason.LOSS_NOT_FINITE,
            f"The loss or its gradient was no finite number in {position.skipped_in_a_row} steps in a row, up to step {position.step}.",
            "Lower learning_rate, or look for unusual records in the dataset.",
        )
    run.emit(Warned("LOSS_NOT_FINITE", f"Step {position.step} gave no finite loss or gradient; its update was left out."))


def _evaluate_if_due(run: Run, position: Position) -> bool:
    """Evaluate where the plan has it and it is not yet done; tell whether these weights are the best so far.

    Nothing is said or noted before the whole evaluation is done: one that a pause cut short is made again.
    """
    step = position.step
    due = step == 0 or step == run.plan.total_steps or step % run.settings.evaluate_every_steps == 0
    if not due or position.evaluated_step == step:
        return False
    check = partial(check_signals, run.signals)
    evaluation = evaluate(run.network, run.objective, run.held_out, run.way.micro_batch_tokens, check) if len(run.held_out) else None
    samples = run.sampler.answer(check) if run.sampler is not None else []
    position.evaluated_step = step
    best = evaluation is not None and _take_evaluation(run, position, evaluation)
    for prompt, text in samples:
        run.emit(Sampled(step, prompt, text))
    return best


def _take_evaluation(run: Run, position: Position, evaluation: Evaluation) -> bool:
    """Note and log an evaluation; tell whether it is the best so far."""
    step, loss = position.step, evaluation.loss
    best = note_loss(position, run.settings, loss)
    if math.isfinite(loss):
        run.emit(Evaluated(step, loss, evaluation.tokens, len(run.held_out), evaluation.seconds, best))
    else:
        run.emit(Warned("LOSS_NOT_FINITE", f"The evaluation after step {step} gave no finite loss."))
    if is_patience_over(run.settings, position) and step < run.plan.total_steps:
        since = position.evaluations_without_improvement
        run.emit(Warned("STOPPED_EARLY", f"Training stops after step {step} of {run.plan.total_steps}: {since} evaluations gave nothing."))
    return best


def _describe_step(run: Run, position: Position, clock: "_Clock", gradients: _Gradients, *, rate: float, norm: float) -> StepDone:
    return StepDone(
        step=position.step,
        total_steps=run.plan.total_steps,
        epoch=run.plan.epoch_after_step(position.step),
        loss=gradients.loss,
        learning_rate=rate,
        gradient_norm=norm,
        tokens=position.tokens,
        trained_tokens=gradients.trained_tokens,
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
