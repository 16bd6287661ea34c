"""Whether a step fits into memory, found out before the first one: by the heaviest micro-batches, in the ways the job allows."""

import gc
from dataclasses import dataclass

import torch

from server.childprocess import explain_failure
from server.domain.events import Warned
from server.domain.jobs import FailureReason, JobFailure
from server.domain.specs import TrainingParameters
from server.training.batches import find_heaviest_groups
from server.training.loop import MICRO_BATCH_TOKENS, Run
from server.training.randomness import untouched_random_state
from server.training.signals import check_signals


@dataclass(frozen=True, slots=True)
class Way:
    """How a step is computed: in groups of so many tokens, with activations kept or computed again. The maths is the same."""

    micro_batch_tokens: int
    recomputes: bool


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
    ways = list_ways(run.settings, can_recompute=run.network.can_recompute)
    for place, way in enumerate(ways):
        run.micro_batch_tokens = way.micro_batch_tokens
        run.network.set_recomputing(way.recomputes)
        if _fits(run):
            if place > 0:
                run.emit(_tell(way, ways[0]))
            return
    raise _fail(run, ways[-1])


def _fits(run: Run) -> bool:
    """Compute forward and backward beside everything else that a step holds."""
    try:
        with untouched_random_state():
            _reserve_optimiser(run)
            for group in find_heaviest_groups(run.examples.records, run.plan.batch_size, run.micro_batch_tokens):
                check_signals(run.signals)
                run.network.model.train()
                batch = run.examples.lay_out(group).to(run.network.model.device)
                run.objective.sum_loss(run.network, batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return True
    except Exception as error:
        failure = explain_failure(error)
        if failure is None or failure.reason is not FailureReason.OUT_OF_MEMORY:
            raise
        return False
    finally:
        run.optimiser.zero_grad(set_to_none=True)
        run.optimiser.state.clear()
        gc.collect()
        torch.cuda.empty_cache()


def _reserve_optimiser(run: Run) -> None:
    """Make the optimiser's moments as the first step will: a step of rate zero along gradients of zero moves nothing."""
    for parameter in run.trained.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for group in run.optimiser.param_groups:
        group["lr"] = 0.0
    run.optimiser.step()


def _tell(way: Way, asked: Way) -> Warned:
    how = []
    if way.micro_batch_tokens < asked.micro_batch_tokens:
        how.append(f"in groups of {way.micro_batch_tokens} tokens instead of {asked.micro_batch_tokens}")
    if way.recomputes and not asked.recomputes:
        how.append("with activations computed again in the backward pass")
    return Warned("MEMORY_SHORT", f"Memory does not suffice otherwise: steps are computed {' and '.join(how)}. The maths is the same.")


def _fail(run: Run, last: Way) -> JobFailure:
    records = run.examples.records
    longest = max(records.length(sequence) for index in range(len(records)) for sequence in records.sequences_of(index))
    changes = ["a smaller base model", "the technique QLORA", f"max_sequence_tokens below {longest}, the longest record's"]
    if last.micro_batch_tokens > longest:
        changes.insert(0, f"micro_batch_tokens below {last.micro_batch_tokens}")
    if not last.recomputes and run.network.can_recompute:
        changes.insert(0, "gradient_checkpointing")
    return JobFailure(
        FailureReason.OUT_OF_MEMORY,
        f"A step does not fit into the memory of this machine, even in groups of {last.micro_batch_tokens} tokens.",
        f"Take {', or '.join(changes)}.",
    )
