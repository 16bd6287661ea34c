"""How long records are in tokens: by the base model's own tokenizer on a sample of them, or guessed from their bytes."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from server.domain.datasets import Dataset
from server.domain.errors import ServiceError
from server.domain.estimates import Range
from server.domain.orders import DatasetFile
from server.domain.previews import MeasureOrder
from server.domain.specs import FineTuneSpec
from server.services.model_ports import BaseModels, RecordMeter

# Enough that the mean of skewed lengths is known within a few percent; read and tokenised in half a second.
SAMPLE_RECORDS = 256
# Somebody waits for the estimate; a model that is converted at its first use takes longer than this once.
MEASURE_SECONDS = 5.0
# UTF-8 bytes per token of a record with its JSON: Arabic in an English tokenizer, English, and code-like repetition.
BYTES_PER_TOKEN = (1.5, 4.0, 6.0)
# How far a sample's mean may be off for other reasons than chance: records alike lie together in many files.
UNEVENNESS = 0.02
# The longest record of all against the longest of the sample.
LONGEST_MARGIN = 1.1


@dataclass(frozen=True, slots=True)
class RecordLengths:
    """Tokens of a dataset's records: of all together, and of the longest one. Measured on a sample, or guessed from bytes."""

    total: Range
    longest: int

    def scale(self, share: float) -> "RecordLengths":
        """Give the lengths of a share of the records; the longest may be among them."""
        total = self.total
        return RecordLengths(Range(total.low * share, total.expected * share, total.high * share), self.longest)


class DatasetSize(Protocol):
    """What a guess must know of a dataset."""

    @property
    def record_count(self) -> int:
        """Records that can be trained on."""

    @property
    def size_bytes(self) -> int:
        """Size of the file."""


@dataclass(frozen=True)
class InlineRecords:
    """Records that came inside a request, as JSON lines."""

    lines: Sequence[bytes]

    @property
    def record_count(self) -> int:
        """Records that can be trained on."""
        return len(self.lines)

    @cached_property
    def size_bytes(self) -> int:
        """Size of the file that they will be."""
        return sum(map(len, self.lines))


class LengthMeasurer:
    """Measures records of datasets and requests."""

    def __init__(self, base_models: BaseModels, meter: RecordMeter) -> None:
        self._base_models = base_models
        self._meter = meter

    async def measure(self, spec: FineTuneSpec, source: Dataset | InlineRecords) -> RecordLengths:
        """Measure a sample where the base model's files lie here and the engine answers in time; else guess. Downloads nothing."""
        longest = spec.parameters.max_sequence_tokens
        counts = await self._count_sample(spec, source)
        return lengths_of_sample(counts, source.record_count, longest) if counts else guess_lengths(source, longest)

    async def _count_sample(self, spec: FineTuneSpec, source: Dataset | InlineRecords) -> Sequence[Sequence[int]]:
        if not await asyncio.to_thread(self._base_models.is_present, spec.base_model):
            return ()
        order = MeasureOrder(spec.base_model, None, (), (), spec.parameters.objective.needs_pairs)
        if isinstance(source, InlineRecords):
            chosen = choose_evenly(source.record_count, SAMPLE_RECORDS)
            order = replace(order, lines=tuple(source.lines[number - 1].decode() for number in chosen))
        else:
            file = DatasetFile(source.path, source.sha256, source.format, source.record_kind, source.record_count)
            total = source.record_count + source.invalid_record_count
            order = replace(order, dataset=file, records=choose_evenly(total, SAMPLE_RECORDS))
        try:
            async with asyncio.timeout(MEASURE_SECONDS):
                return await self._meter.measure(order)
        except (ServiceError, TimeoutError):
            return ()


def choose_evenly(total: int, most: int) -> tuple[int, ...]:
    """Choose numbers from 1 to `total` with even gaps between them, at most so many."""
    count = min(total, most)
    return tuple(1 + place * total // count for place in range(count))


def guess_lengths(dataset: DatasetSize, max_tokens: int) -> RecordLengths:
    """Guess lengths from the size of the file."""
    records = max(1, dataset.record_count)
    low, expected, high = (dataset.size_bytes / per_token for per_token in reversed(BYTES_PER_TOKEN))
    mean = expected / records
    # Lengths are skewed: the longest of many records is some four times their mean.
    longest = min(max_tokens, math.ceil(mean * (1 if records == 1 else 4)))
    cap = float(max_tokens * records)
    return RecordLengths(Range(min(low, cap), min(expected, cap), min(high, cap)), max(1, longest))


def lengths_of_sample(sample: Sequence[Sequence[int]], record_count: int, max_tokens: int) -> RecordLengths:
    """Conclude from some records' token counts, one for each sequence of a record, to all of them; what is too long counts as cut."""
    counts = [sum(min(count, max_tokens) for count in sequences) for sequences in sample]
    mean = sum(counts) / len(counts)
    longest = max(max(sequences) for sequences in sample)
    if len(counts) >= record_count:
        return RecordLengths(_exactly(float(sum(counts))), min(max_tokens, longest))
    deviation = math.sqrt(sum((count - mean) ** 2 for count in counts) / max(1, len(counts) - 1))
    margin = 2 * deviation / math.sqrt(len(counts)) + UNEVENNESS * mean
    total = Range(max(1.0, mean - margin) * record_count, mean * record_count, (mean + margin) * record_count)
    return RecordLengths(total, min(max_tokens, math.ceil(longest * LONGEST_MARGIN)))


def _exactly(value: float) -> Range:
    return Range(value, value, value)
