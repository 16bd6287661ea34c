"""Random numbers that must not be used up: what is tried or shown beside training leaves the generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Put back the states of torch's generators, host and accelerator, at the end."""
    host = torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device)
