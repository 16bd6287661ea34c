"""The learning rate of each step: a pure function, so that a resumed job needs no state of it."""

import math

from server.domain.specs import Scheduler


def learning_rate(step: int, *, total_steps: int, peak: float, warmup_steps: int, scheduler: Scheduler) -> float:
    """Give the rate for step number `step` (from 0): a linear warm-up to `peak`, then constant, or down to zero after the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if scheduler is Scheduler.LINEAR:
        return peak * (1.0 - progress)
    if scheduler is Scheduler.COSINE:
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak
