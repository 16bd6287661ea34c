"""Which records a step trains and how they lie in micro-batches: functions of seed and step alone, so resuming needs but a number."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from server.datafiles.tokens import TokenizedRecords


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
    """Sequences laid end to end, without padding: T tokens, S sequences, N trained tokens.

    `predictors` [N] are the places whose hidden state predicts `targets` [N]; `lengths` sums to T.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, from 0 in each sequence
    lengths: tuple[int, ...]  # S of them
    predictors: torch.Tensor  # [N] int64
    targets: torch.Tensor  # [N] int64
    weights: torch.Tensor  # [N] float32, what each target counts
    sequences: torch.Tensor  # [N] int64, the sequence of each target, from 0
    reference: torch.Tensor | None = None  # [S] float32, the starting model's log-probability of each sequence

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
        if self.token_ids.device == device:
            return self
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            sequences=self.sequences.to(device),
            reference=self.reference.to(device) if self.reference is not None else None,
        )


def make_micro_batch(records: TokenizedRecords, indices: Sequence[int], reference: torch.Tensor | None = None) -> MicroBatch:
    """Lay the sequences of records end to end. `reference` holds a number for each sequence of all records."""
    sequences = [sequence for index in indices for sequence in records.sequences_of(index)]
    ids = [records.token_ids(sequence) for sequence in sequences]
    token_ids = np.concatenate(ids).astype(np.int64)
    lengths = np.array([len(part) for part in ids])
    starts = np.cumsum(lengths) - lengths
    trained = np.flatnonzero(np.concatenate([records.trained_mask(sequence) for sequence in sequences]))
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(np.arange(len(token_ids)) - np.repeat(starts, lengths)),
        lengths=tuple(lengths.tolist()),
        predictors=torch.from_numpy(trained - 1),
        targets=torch.from_numpy(token_ids[trained]),
        weights=torch.from_numpy(np.concatenate([records.weights(sequence) for sequence in sequences])[trained]),
        sequences=torch.from_numpy(np.searchsorted(starts, trained, side="right") - 1),
        reference=reference[sequences] if reference is not None else None,
    )


def split_micro_batches(records: TokenizedRecords, indices: Iterable[int], max_tokens: int) -> Iterator[list[int]]:
    """Cut a step's records, longest first, into groups of similar length with at most `max_tokens` tokens, padding included.

    Longest first: what does not fit into memory fails at once. A record longer than `max_tokens` stands alone.
    """
    group: list[int] = []
    widest = 0  # tokens of the group's first record, had all its sequences the length of the longest
    for index in sorted(indices, key=lambda index: -_width(records, index)):
        if group and (len(group) + 1) * widest > max_tokens:
            yield group
            group = []
        if not group:
            widest = _width(records, index)
        group.append(index)
    if group:
        yield group


def _width(records: TokenizedRecords, index: int) -> int:
    return records.sequences_per_record * max(records.length(sequence) for sequence in records.sequences_of(index))


def find_heaviest_groups(records: TokenizedRecords, batch_size: int, max_tokens: int) -> list[list[int]]:
    """Give the micro-batches by which memory is tried: the one of the longest record, and the one with the most tokens if another."""
    groups = [group[:batch_size] for group in split_micro_batches(records, range(len(records)), max_tokens)]
    fullest = max(groups, key=lambda group: sum(records.length(sequence) for index in group for sequence in records.sequences_of(index)))
    return groups[:1] if fullest == groups[0] else [groups[0], fullest]


@dataclass(frozen=True, slots=True)
class Examples:
    """Records to learn from or to evaluate, with the starting model's log-probability of each of their sequences where one is needed."""

    records: TokenizedRecords
    reference: torch.Tensor | None = None  # float32, one per sequence, in their order

    def __len__(self) -> int:
        return len(self.records)

    def split(self, indices: Iterable[int], max_tokens: int) -> Iterator[list[int]]:
        """Cut records into the groups of micro-batches."""
        return split_micro_batches(self.records, indices, max_tokens)

    def lay_out(self, group: Sequence[int]) -> MicroBatch:
        """Make a group's micro-batch."""
        return make_micro_batch(self.records, group, self.reference)
