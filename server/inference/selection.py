"""Which ranks of the adapter pool each row of a pass uses. Knows no weights."""

from collections.abc import Sequence
from functools import cached_property

import torch

from server.inference.kernels.lowrank import Spans


class RankUse:
    """The ranks of one pass: one range per row, an empty one for the bare base; `first` and `last` bound those in use."""

    def __init__(self, ranges: Sequence[tuple[int, int]], device: torch.device) -> None:
        used = [r for r in ranges if r[0] < r[1]]
        self.first, self.last = (min(r[0] for r in used), max(r[1] for r in used)) if used else (0, 0)
        self._ranges, self._device = ranges, device

    @cached_property
    def spans(self) -> Spans:
        """The ranges as the kernel takes them."""
        return Spans(self._ranges)

    @cached_property
    def foreign(self) -> torch.Tensor | None:
        """Mark ranks in [first, last) that are not a row's own, [rows, 1, last - first]; None where all rows use all of them.

        They are overwritten with zero, not multiplied by it: an overflow in one adapter stays there.
        """
        if all(r == (self.first, self.last) for r in self._ranges):
            return None
        bounds = torch.tensor(self._ranges, device=self._device)
        ranks = torch.arange(self.first, self.last, device=self._device)
        return ((ranks < bounds[:, :1]) | (ranks >= bounds[:, 1:])).unsqueeze(1)


class AdapterSelection:
    """What the current pass uses, shared by all projections of a model."""

    def __init__(self) -> None:
        self.current = RankUse((), torch.device("cpu"))

    def choose(self, ranges: Sequence[tuple[int, int]], device: torch.device) -> None:
        """Set one range of ranks per row for the coming pass."""
        self.current = RankUse(ranges, device)
