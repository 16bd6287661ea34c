"""Which records a step trains and how they lie in micro-batches: functions of seed and step alone, so resuming needs but a number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from server.training.data import TokenizedRecords


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A stream of records, epoch after epoch, each in an order of its own, cut into steps of `batch_size` records.

    A step may span two epochs; only the very last one may be smaller, so that every record is trained equally often.
    """

    record_count: int
    batch_size: int
    total_records: int
    seed: int

    @classmethod
    def of(cls, record_count: int, *, batch_size: int, epochs: float, max_steps: int | None, seed: int) -> "BatchPlan":
        """Plan for `max_steps` full steps where it is set, else for `epochs` passes (a fraction of a pass counts)."""
        total = max_steps * batch_size if max_steps is not None else max(1, round(record_count * epochs))
        return cls(record_count, batch_size, total, seed)

    @property
    def total_steps(self) -> int:
        """The number of optimiser steps."""
        return -(-self.total_records // self.batch_size)

    def records_of_step(self, step: int) -> list[int]:
        """Give the indices of the records that step number `step` (from 0) trains."""
        places = range(step * self.batch_size, min((step + 1) * self.batch_size, self.total_records))
        return [int(_shuffle(self.record_count, self.seed, place // self.record_count)[place % self.record_count]) for place in places]

    def epoch_after_step(self, step: int) -> float:
        """Give the passes over the data that are done after `step` steps."""
        return min(step * self.batch_size, self.total_records) / self.record_count


@lru_cache(maxsize=2)
def _shuffle(record_count: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(record_count)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Records laid end to end, without padding. T tokens, N of them trained.

    `predictors` [N] are the places whose hidden state predicts `targets` [N], each of which counts `weights` [N] times and belongs to
    the batch's sequence number `sequences` [N]; `lengths` sums to T.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, from 0 in each record
    lengths: tuple[int, ...]
    predictors: torch.Tensor  # [N] int64
    targets: torch.Tensor  # [N] int64
    weights: torch.Tensor  # [N] float32
    sequences: torch.Tensor  # [N] int64

    @property
    def token_count(self) -> int:
        """The real tokens."""
        return len(self.token_ids)

    @property
    def trained_count(self) -> int:
        """The tokens whose prediction counts."""
        return len(self.targets)

    def to(self, device: torch.device) -> "MicroBatch":
        """Give the same batch on a device."""
        moved = {
            name: getattr(self, name).to(device) for name in ("token_ids", "positions", "predictors", "targets", "weights", "sequences")
        }
        return replace(self, **moved)


def make_micro_batch(records: TokenizedRecords, indices: Sequence[int]) -> MicroBatch:
    """Lay records end to end."""
    ids = [records.token_ids(index) for index in indices]
    masks = [records.trained_mask(index) for index in indices]
    token_ids = np.concatenate(ids).astype(np.int64)
    trained = np.flatnonzero(np.concatenate(masks))
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(np.concatenate([np.arange(len(part), dtype=np.int64) for part in ids])),
        lengths=tuple(len(part) for part in ids),
        predictors=torch.from_numpy(trained - 1),
        targets=torch.from_numpy(token_ids[trained]),
        weights=torch.ones(len(trained)),
        sequences=torch.from_numpy(np.repeat(np.arange(len(ids)), [len(part) for part in ids])[trained]),
    )


def split_micro_batches(records: TokenizedRecords, indices: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Cut a step's records, longest first, into groups of similar length with at most `max_tokens` tokens, padding included.

    Longest first: what does not fit into memory fails at once. A record longer than `max_tokens` stands alone.
    """
    group: list[int] = []
    for index in sorted(indices, key=lambda index: -records.length(index)):
        if group and (len(group) + 1) * records.length(group[0]) > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
