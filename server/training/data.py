"""A dataset file to token arrays: the same records that the upload accepted, rendered as they will be served."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from server.basemodels.errors import RenderingRefused
from server.basemodels.rendering import render_record
from server.domain.findings import Finding
from server.domain.jobs import FailureReason, JobFailure
from server.domain.records import MAX_RECORD_BYTES, RecordInvalid, parse_record
from server.domain.specs import OverlongPolicy

MAX_SHOWN_LINES = 5

TokenIds = np.ndarray[tuple[int], np.dtype[np.int32]]
TrainedMask = np.ndarray[tuple[int], np.dtype[np.bool_]]
Weights = np.ndarray[tuple[int], np.dtype[np.float32]]


class TokenizedRecords:
    """Records as sequences of token ids with one weight per token, held flat: 8 bytes per token, whatever the number of records.

    A record is one sequence, or two: the chosen and the rejected one of a preference pair.
    """

    def __init__(self, sequences_per_record: int = 1) -> None:
        self.sequences_per_record = sequences_per_record
        self._ids = array("i")
        self._weights = array("f")
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return (len(self._starts) - 1) // self.sequences_per_record

    def append(self, token_ids: Sequence[int], weights: Sequence[float]) -> None:
        """Add a sequence; a weight of 0 leaves its token untrained."""
        self._ids.extend(token_ids)
        self._weights.extend(weights)
        self._starts.append(len(self._ids))

    def sequences_of(self, record: int) -> range:
        """Give the numbers of a record's sequences."""
        return range(record * self.sequences_per_record, (record + 1) * self.sequences_per_record)

    def length(self, sequence: int) -> int:
        """Give a sequence's length in tokens."""
        return self._starts[sequence + 1] - self._starts[sequence]

    def token_ids(self, sequence: int) -> TokenIds:
        """Give a sequence's token ids."""
        return np.array(self._ids[self._starts[sequence] : self._starts[sequence + 1]], dtype=np.int32)

    def weights(self, sequence: int) -> Weights:
        """Give what each token counts. The first one has no predecessor to be predicted from and is never trained."""
        weights = np.array(self._weights[self._starts[sequence] : self._starts[sequence + 1]], dtype=np.float32)
        weights[0] = 0.0
        return weights

    def trained_mask(self, sequence: int) -> TrainedMask:
        """Tell which tokens of a sequence are trained."""
        return self.weights(sequence) > 0.0

    def select(self, records: Sequence[int]) -> "TokenizedRecords":
        """Give a copy with only these records."""
        chosen = TokenizedRecords(self.sequences_per_record)
        for sequence in (sequence for record in records for sequence in self.sequences_of(record)):
            start, end = self._starts[sequence], self._starts[sequence + 1]
            chosen._ids.extend(self._ids[start:end])
            chosen._weights.extend(self._weights[start:end])
            chosen._starts.append(len(chosen._ids))
        return chosen


@dataclass(slots=True)
class ReadResult:
    """What a file gave: the records, what was left out and why."""

    records: TokenizedRecords = field(default_factory=TokenizedRecords)
    invalid: list[Finding] = field(default_factory=list)
    refused: list[Finding] = field(default_factory=list)
    overlong_lines: list[int] = field(default_factory=list)
    longest_tokens: int = 0


def read_records(path: Path, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> ReadResult:
    """Read, render and tokenise a JSONL file, line by line."""
    result = ReadResult()
    for number, line in _numbered_lines(path):
        try:
            rendered = render_record(tokenizer, parse_record(line))
        except RecordInvalid as error:
            result.invalid.append(error.to_finding(number))
            continue
        except RenderingRefused as error:
            result.refused.append(Finding(number, error.reason, str(error)))
            continue
        result.longest_tokens = max(result.longest_tokens, len(rendered.token_ids))
        if len(rendered.token_ids) > max_tokens:
            result.overlong_lines.append(number)
        else:
            result.records.append(rendered.token_ids, rendered.trained_mask)
    return result


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES + 2):
            number += 1
            while not line.endswith(b"\n") and (rest := file.readline(MAX_RECORD_BYTES)):
                line = line[: MAX_RECORD_BYTES + 1] + rest[-1:]  # still too long for a record, and bounded
            if line.strip():
                yield number, line


def check_records(result: ReadResult, *, policy: OverlongPolicy, max_tokens: int) -> None:
    """Refuse data that cannot be trained as asked. Raises JobFailure(DATASET_INVALID) that names lines and counts."""
    if result.refused:
        first = result.refused[0]
        raise JobFailure(
            FailureReason.DATASET_INVALID,
            f"The base model's chat template cannot express {len(result.refused)} records "
            f"(lines {_show([finding.line for finding in result.refused])}): {first.message}",
            "Change or remove these records.",
        )
    if result.overlong_lines and policy is OverlongPolicy.REJECT:
        raise JobFailure(
            FailureReason.DATASET_INVALID,
            f"{len(result.overlong_lines)} records have more than {max_tokens} tokens (lines {_show(result.overlong_lines)}; "
            f"the longest has {result.longest_tokens}).",
            f"Raise max_sequence_tokens to {result.longest_tokens}, shorten these records, or choose the overlong policy DROP.",
        )
    if not len(result.records):
        raise JobFailure(FailureReason.DATASET_INVALID, "No record is left to train on.", "Upload a dataset with at least one good record.")


def _show(lines: list[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:MAX_SHOWN_LINES])
    return shown + (", …" if len(lines) > MAX_SHOWN_LINES else "")


def split_held_out(records: TokenizedRecords, fraction: float, seed: int) -> tuple[TokenizedRecords, TokenizedRecords]:
    """Split off `fraction` of the records (rounded down) for evaluation: the same ones for the same seed."""
    held_out = int(len(records) * fraction)
    order = np.random.Generator(np.random.PCG64([seed, 2**32 - 1])).permutation(len(records)).tolist()
    return records.select(sorted(order[held_out:])), records.select(sorted(order[:held_out]))
