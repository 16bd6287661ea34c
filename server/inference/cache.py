"""Keys and values of the requests in flight: one pre-allocated row per request, no re-allocation while tokens are made.

Knows nothing of requests: rows are numbers, and who owns which row is the batch's business.
"""

import contextlib
import mmap
import sys
from dataclasses import dataclass, field

import torch
from transformers import Cache

# From Linux's mman-common.h; Python has it from 3.13 on.
MAP_NORESERVE = 0x4000
# A mask entry that hides a position. A finite minimum would do as well, but each query sees at least itself.
HIDDEN = float("-inf")


@dataclass(frozen=True)
class CacheShape:
    """The size of one row: what one token costs, and how many tokens fit."""

    layers: int
    key_value_heads: int
    head_size: int
    tokens_per_row: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that one token takes in all layers."""
        return 2 * self.layers * self.key_value_heads * self.head_size * self.dtype.itemsize


@dataclass
class Step:
    """One forward pass over rows `first_row …`, each with as many new tokens: positions has the shape [rows, new tokens].

    Carries what all layers share (masks, rotary factors), so that it is computed once.
    """

    first_row: int
    positions: torch.Tensor
    longest_tokens: int
    dtype: torch.dtype
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def rows(self) -> int:
        """How many rows take part."""
        return self.positions.shape[0]

    def mask(self, window_tokens: int | None, groups: int) -> torch.Tensor:
        """Give the additive mask [rows, 1, groups x new tokens, longest]: each query sees its row up to itself, at most a window back.

        Query heads that share a key head (`groups` of them) are laid behind each other as if they were further tokens.
        """
        known = self.masks.get((window_tokens, groups))
        if known is None:
            keys = torch.arange(self.longest_tokens, device=self.positions.device)
            queries = self.positions[:, None, :, None]
            hidden = keys > queries
            if window_tokens is not None:
                hidden = hidden | (keys <= queries - window_tokens)
            known = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device).masked_fill_(hidden, HIDDEN)
            known = known.repeat(1, 1, groups, 1) if groups > 1 else known
            self.masks[window_tokens, groups] = known
        return known


class RowCache(Cache):
    """A transformers Cache over a pool [rows, layers, keys then values, heads, tokens, head size].

    On Linux's CPU the pool is an anonymous mapping: pages that no token has reached take no memory, a cleared row gives its pages back.
    """

    def __init__(self, shape: CacheShape, rows: int) -> None:
        super().__init__(layers=[])
        self.shape, self.rows = shape, rows
        pool_shape = (rows, shape.layers, 2 * shape.key_value_heads, shape.tokens_per_row, shape.head_size)
        self._row_bytes = shape.token_bytes * shape.tokens_per_row
        self._mapping: mmap.mmap | None = None
        if shape.device.type == "cpu" and sys.platform == "linux":
            # Private: only then does MADV_DONTNEED drop pages, and zeros come back in their place. Not reserved: whole rows may be more
            # than the machine has (256 of SmolLM2: 48 GB), which the system would refuse, though admission bounds what is used of them.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            self._mapping = mmap.mmap(-1, rows * self._row_bytes, flags=flags)
            # Huge pages would take memory for whole rows at their first tokens. A kernel without them refuses, and needs it not.
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_NOHUGEPAGE)
            self._pool = torch.frombuffer(self._mapping, dtype=shape.dtype).view(pool_shape)
        else:
            self._pool = torch.zeros(pool_shape, dtype=shape.dtype, device=shape.device)
        self._layers = [self._pool[:, layer] for layer in range(shape.layers)]
        self._step: Step | None = None
        self._row_indices = torch.arange(rows, device=shape.device)

    def begin(self, step: Step) -> None:
        """Set which rows and positions the coming forward pass writes."""
        self._step = step

    def write(self, layer: int, key_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [rows, new tokens, 2 x heads, head size]; give all keys and all values of these rows so far.

        Both come back as views [rows, heads, longest, head size]; nothing is copied.
        """
        step = self._current()
        pool, first, heads = self._layers[layer], step.first_row, self.shape.key_value_heads
        rows, new_tokens = step.positions.shape
        if new_tokens == 1 and rows > 1:
            pool[self._row_indices[first : first + rows], :, step.positions[:, 0]] = key_values[:, 0]
        else:
            start = step.longest_tokens - new_tokens
            pool[first : first + rows, :, start : step.longest_tokens] = key_values.transpose(1, 2)
        seen = pool[first : first + rows, :, : step.longest_tokens]
        return seen[:, :heads], seen[:, heads:]

    def rows_of(self, layer: int) -> torch.Tensor:
        """Give the keys and values [rows, 2 x heads, tokens, head size] of this pass's rows, to be read and written in place."""
        first = self._current().first_row
        return self._layers[layer][first : first + self._current().rows]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what a transformers attention layer computed ([rows, heads, new tokens, head size]); see `write`."""
        return self.write(layer_idx, torch.cat((key_states, value_states), dim=1).transpose(1, 2))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the longest row before this pass. Modeling code asks; positions and masks come from the Step instead."""
        step = self._current()
        return step.longest_tokens - step.positions.shape[1]

    def put_prefix(self, row: int, prefix: torch.Tensor) -> None:
        """Begin a row with ready keys and values [layers, 2 x heads, tokens, head size], keys first."""
        self._pool[row, :, :, : prefix.shape[2]] = prefix

    def copy_row(self, row: int) -> torch.Tensor:
        """Give a copy of a whole row, as `put_prefix` takes it."""
        return self._pool[row].clone()

    def move_row(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one row to another."""
        self._pool[target, :, :, :tokens] = self._pool[source, :, :, :tokens]

    def clear_row(self, row: int) -> None:
        """Forget a row: zeros again, and its memory back to the system."""
        page = mmap.PAGESIZE
        if self._mapping is not None and self._row_bytes % page == 0:
            self._mapping.madvise(mmap.MADV_DONTNEED, row * self._row_bytes, self._row_bytes)
        else:
            self._pool[row].zero_()

    def clear_all(self) -> None:
        """Give all memory back that the system can take; nobody may use a row any more."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def _current(self) -> Step:
        if self._step is None:
            raise RuntimeError("RowCache.begin was not called before the forward pass")
        return self._step
