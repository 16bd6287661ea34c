"""Whether a step fits into memory, found out before the first one by the heaviest micro-batches, and what to do where it does not."""

import ctypes
import gc
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from server.childprocess import explain_failure
from server.domain.events import Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.specs import TrainingParameters
from server.training.batches import find_heaviest_groups
from server.training.randomness import RandomState, untouched_random_state
from server.training.signals import check_signals
from server.training.state import MICRO_BATCH_TOKENS, Run, Way

T = TypeVar("T")


def list_ways(settings: TrainingParameters, *, can_recompute: bool) -> list[Way]:
    """Give the ways in the order in which they are tried: as asked, in half the tokens, and with less kept, as the job allows."""
    tokens = settings.micro_batch_tokens or MICRO_BATCH_TOKENS
    half = tokens // 2 if settings.retry_out_of_memory else tokens
    recomputes = settings.gradient_checkpointing is True and can_recompute
    ways = [Way(tokens, recomputes), Way(half, recomputes)]
    if settings.gradient_checkpointing is None and can_recompute:
        ways.append(Way(half, True))
    return list(dict.fromkeys(ways))


def settle_memory(run: Run) -> None:
    """Try the heaviest micro-batches, gradients thrown away, and leave the run in the first way that fits.

    No number of the training changes by it: weights, optimiser and random state stay. Raises JobFailure(OUT_OF_MEMORY).
    """
    if run.settings.gradient_checkpointing and not run.network.can_recompute:
        run.emit(Warned("GRADIENT_CHECKPOINTING_LEFT_OUT", "This model or technique cannot compute activations again; they are kept."))
    first, *run.other_ways = list_ways(run.settings, can_recompute=run.network.can_recompute)
    _take_way(run, first)
    try:
        with untouched_random_state():
            compute_in_memory(run, partial(_try_heaviest, run))
    finally:
        _free(run)
        run.optimiser.state.clear()


def compute_in_memory(run: Run, compute: Callable[[], T]) -> T:
    """Compute gradients; where memory runs out, from the start again in the next way that takes less.

    Raises JobFailure(OUT_OF_MEMORY) when no way is left.
    """
    while True:
        random = RandomState.now()
        try:
            return compute()
        except Exception as error:
            failure = explain_failure(error)
            if failure is None or failure.reason is not FailureReason.OUT_OF_MEMORY:
                raise
        # Only here the frames of the exception, and the activations in them, are gone.
        _free(run)
        random.restore()
        if not run.other_ways:
            raise _explain(run)
        before = run.way
        _take_way(run, run.other_ways.pop(0))
        run.emit(_tell(before, run.way))


def _take_way(run: Run, way: Way) -> None:
    run.way = way
    run.network.set_recomputing(way.recomputes)


def _free(run: Run) -> None:
    run.optimiser.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give the system back what is free in the heap.

    glibc keeps the gaps between live blocks: half a gigabyte after a failed step, and 0.8 GB more over six steps of mixed lengths.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _try_heaviest(run: Run) -> None:
    """Compute forward and backward beside everything else that a step holds."""
    _reserve_optimiser(run)
    run.network.model.train()
    for group in find_heaviest_groups(run.examples.records, run.plan.batch_size, run.way.micro_batch_tokens):
        check_signals(run.signals)
        batch = run.examples.lay_out(group).to(run.network.model.device)
        run.objective.sum_loss(run.network, batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _reserve_optimiser(run: Run) -> None:
    """Make the optimiser's moments as the first step will: a step of rate zero along gradients of zero moves nothing."""
    for parameter in run.trained.parameters.values():
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    for group in run.optimiser.param_groups:
        group["lr"] = 0.0
    run.optimiser.step()


def _tell(before: Way, now: Way) -> Warned:
    if now.micro_batch_tokens < before.micro_batch_tokens:
        how = f"in groups of {now.micro_batch_tokens} tokens instead of {before.micro_batch_tokens}"
    else:
        how = "with activations computed again in the backward pass"
    return Warned("MEMORY_SHORT", f"Memory does not suffice: steps are computed {how} from now on. The maths is the same.")


def _explain(run: Run) -> JobFailure:
    records, way = run.examples.records, run.way
    longest = max(records.length(sequence) for index in range(len(records)) for sequence in records.sequences_of(index))
    changes = ["a smaller base model", "the technique QLORA", f"max_sequence_tokens below {longest}, the longest record's"]
    if way.micro_batch_tokens > longest:
        changes.insert(0, f"micro_batch_tokens below {way.micro_batch_tokens}")
    if not way.recomputes and run.network.can_recompute:
        changes.insert(0, "gradient_checkpointing")
    return JobFailure(
        FailureReason.OUT_OF_MEMORY,
        f"A step does not fit into the memory of this machine, in groups of {way.micro_batch_tokens} tokens.",
        f"Take {', or '.join(changes)}.",
    )
