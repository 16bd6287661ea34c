"""Which ranks of the adapter pool each pass uses, and when it pays to lay them out for the processor. Knows no weights."""

from collections.abc import Sequence

import torch

# Laying ranks out takes about as long as two steps (60 ms for 128 ranks of SmolLM2-135M) and saves a quarter of each step that follows.
PASSES_BEFORE_PACKING = 8
# Projections that are laid out per pass: all at once would make everybody wait for one token.
PACKS_PER_PASS = 12
# A layout that holds more than so many times the ranks in use is given up: its foreign ranks cost as much as own ones.
KEPT_EXCESS = 2


class AdapterSelection:
    """Which adapter ranks the rows of the current pass use, shared by all projections of a model.

    `first` and `last` bound the ranks in use; `foreign` [rows, 1, last - first] marks those that are not the row's own, and is None
    where all rows use all of them. Foreign ranks are overwritten with zero, not multiplied by it: an overflow in one adapter stays there.
    `edition` is the number of the layout that projections may use in this pass, None where they work on the pool as it is.
    """

    def __init__(self, *, can_pack: bool = False) -> None:
        self.can_pack = can_pack
        self.first, self.last = 0, 0
        self.foreign: torch.Tensor | None = None
        self.edition: int | None = None
        self._foreign_by_parts: dict[int, torch.Tensor] = {}
        self._kept, self._kept_edition, self._kept_passes = (0, 0), 0, 0
        self._packs_left = 0

    @property
    def is_empty(self) -> bool:
        """True when every row runs on the bare base."""
        return self.last == self.first

    def choose(self, ranges: Sequence[tuple[int, int]], device: torch.device, *, is_decoding: bool = False) -> None:
        """Set one range of ranks per row; an empty range is the bare base. Passes that decode are many alike, and worth a layout."""
        used = [r for r in ranges if r[0] < r[1]]
        self.foreign, self.edition = None, None
        self._foreign_by_parts.clear()
        if not used:
            self.first, self.last = 0, 0
            return
        self.first, self.last = min(r[0] for r in used), max(r[1] for r in used)
        if is_decoding and self.can_pack:
            self._keep()
        if len(used) == len(ranges) and all(r == (self.first, self.last) for r in used):
            return
        bounds = torch.tensor(ranges, device=device)
        ranks = torch.arange(self.first, self.last, device=device)
        self.foreign = ((ranks < bounds[:, :1]) | (ranks >= bounds[:, 1:])).unsqueeze(1)

    def mark_foreign(self, parts: int) -> torch.Tensor | None:
        """Give `foreign` once per part, [rows, 1, parts x ranks]; computed once per pass."""
        if self.foreign is None or parts == 1:
            return self.foreign
        if parts not in self._foreign_by_parts:
            self._foreign_by_parts[parts] = self.foreign.repeat(1, 1, parts)
        return self._foreign_by_parts[parts]

    def take_pack(self) -> bool:
        """Tell whether one more projection may be laid out in this pass."""
        self._packs_left -= 1
        return self._packs_left >= 0

    def expire(self) -> None:
        """Forget the layout: the pool's content has changed."""
        self._kept_edition, self._kept_passes = self._kept_edition + 1, 0

    def _keep(self) -> None:
        """Take the ranks of the passes before, where they cover this pass; once they have stayed the same, their layout is used."""
        first, last = self._kept
        if first > self.first or last < self.last or last - first > KEPT_EXCESS * (self.last - self.first):
            self._kept = (self.first, self.last)
            self.expire()
        self._kept_passes += 1
        if self._kept_passes > PASSES_BEFORE_PACKING:
            self.first, self.last = self._kept
            self.edition, self._packs_left = self._kept_edition, PACKS_PER_PASS
