"""Low-rank adapters of many requests in one pass: each row reads the ranks of its own adapter, and no others.

What Punica calls SGMV (https://arxiv.org/abs/2310.18547), for a CPU.
"""

from collections.abc import Sequence

import numpy as np
import torch

from server.inference.kernels.memory import load_integer
from server.inference.kernels.products import add_rows, multiply_rows, narrow, widen
from server.inference.kernels.team import (
    FIRST_OWN,
    HALF_BYTES,
    INTEGER_BYTES,
    NUMBER_BYTES,
    Block,
    Kernel,
    Team,
    find_scratch,
    thread_count,
    thread_number,
)

_ROWS, _TOKENS, _WIDTH, _OUT, _PARTS, _RANKS, _X, _BASE, _SPANS, _DOWN, _FIRST_PART = range(FIRST_OWN, FIRST_OWN + 11)


def _add_adapters(block: int) -> None:
    """Do base += (x A') B for this thread's share of the tokens."""
    tokens, width, out = load_integer(block, _TOKENS), load_integer(block, _WIDTH), load_integer(block, _OUT)
    parts, ranks, spans = load_integer(block, _PARTS), load_integer(block, _RANKS), load_integer(block, _SPANS)
    number, count, all_tokens = thread_number(), thread_count(), load_integer(block, _ROWS) * tokens
    x = find_scratch(block)
    inner = x + width * NUMBER_BYTES
    sums = inner + ranks * NUMBER_BYTES
    for token in range(all_tokens * number // count, all_tokens * (number + 1) // count):
        span = spans + token // tokens * 3 * INTEGER_BYTES
        first, rank = load_integer(span, 1), load_integer(span, 2)
        if rank == 0:
            continue
        place = load_integer(span, 0) * tokens + token % tokens
        base = load_integer(block, _BASE) + place * out * HALF_BYTES
        widen(load_integer(block, _X) + place * width * HALF_BYTES, x, width)
        for part in range(parts):
            features, up = load_integer(block, _FIRST_PART + 2 * part), load_integer(block, _FIRST_PART + 2 * part + 1)
            down = load_integer(block, _DOWN) + (first * parts + part) * width * HALF_BYTES
            multiply_rows(x, down, parts * width * HALF_BYTES, rank, width, inner)
            widen(base, sums, features)
            add_rows(inner, up + first * features * HALF_BYTES, features * HALF_BYTES, rank, features, sums)
            narrow(sums, base, features)
            base += features * HALF_BYTES


_KERNEL = Kernel(_add_adapters)


class Spans:
    """The ranks that the rows of a pass use: [row, first rank, ranks] in the order of their adapters, so that neighbours share a cache."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        ordered = sorted((first, last - first, row) for row, (first, last) in enumerate(ranges))
        self._numbers = np.array([(row, first, ranks) for first, ranks, row in ordered], dtype=np.int64)
        self.rows, self.address = len(ordered), self._numbers.ctypes.data
        self.most_ranks = max(ranks for _, ranks, _ in ordered)
        self.all_ranks = sum(ranks for _, ranks, _ in ordered)


class LowRankSum:
    """Adds adapters to one projection's output. A is [ranks, parts, in], B per part [ranks, out]; both are bfloat16 and contiguous."""

    def __init__(self, team: Team, down: torch.Tensor, up: Sequence[torch.Tensor]) -> None:
        self._team, self._matrices = team, (down, *up)
        _, parts, width = down.shape
        features = [part.shape[1] for part in up]
        per_part = [number for part, columns in zip(up, features, strict=True) for number in (columns, part.data_ptr())]
        self._block = Block(0, 0, width, sum(features), parts, 0, 0, 0, 0, down.data_ptr(), *per_part)
        self._work_per_rank = parts * width + sum(features)

    def add(self, base: torch.Tensor, x: torch.Tensor, spans: Spans) -> None:
        """Add to base [rows, tokens, out], in place, what the rows' adapters make of x [rows, tokens, in]; both contiguous.

        Raises ValueError for other shapes or numbers, which the kernel would read and write all the same.
        """
        is_known = x.dim() == 3 and base.shape[:2] == x.shape[:2] and x.shape[0] == spans.rows and base.is_contiguous()
        if not is_known or not x.dtype == base.dtype == torch.bfloat16:
            raise ValueError(f"adapters for {x.dtype} {tuple(x.shape)} and {spans.rows} rows are not computed here")
        values, tokens = self._block.values, x.shape[1]
        values[_ROWS], values[_TOKENS], values[_RANKS], values[_SPANS] = spans.rows, tokens, spans.most_ranks, spans.address
        values[_X], values[_BASE] = x.data_ptr(), base.data_ptr()
        work = spans.all_ranks * tokens * self._work_per_rank
        self._team.run(_KERNEL, self._block, work, values[_WIDTH] + spans.most_ranks + values[_OUT])
