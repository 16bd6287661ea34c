"""Random numbers that must not be used up: what is tried or shown beside training leaves the generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RandomState:
    """The states of torch's generators, host and accelerator."""

    host: torch.Tensor
    device: torch.Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """Take down the states as they are."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Put the states back at the end."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()
