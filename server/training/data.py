"""A dataset file to token arrays: the same records that the upload accepted, rendered as they will be served."""

from array import array
from collections.abc import Iterator
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


class TokenizedRecords:
    """Records as token ids with one flag per token, held flat: 5 bytes per token, whatever the number of records."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._trained = bytearray()
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, token_ids: list[int], trained_mask: tuple[bool, ...]) -> None:
        """Add a record."""
        self._ids.extend(token_ids)
        self._trained.extend(trained_mask)
        self._starts.append(len(self._ids))

    def length(self, index: int) -> int:
        """Give a record's length in tokens."""
        return self._starts[index + 1] - self._starts[index]

    def token_ids(self, index: int) -> TokenIds:
        """Give a record's token ids."""
        return np.array(self._ids[self._starts[index] : self._starts[index + 1]], dtype=np.int32)

    def trained_mask(self, index: int) -> TrainedMask:
        """Give a record's flags. The first token has no predecessor to be predicted from and is never trained."""
        mask = np.array(self._trained[self._starts[index] : self._starts[index + 1]], dtype=np.bool_)
        mask[0] = False
        return mask

    def select(self, indices: list[int]) -> "TokenizedRecords":
        """Give a copy with only these records."""
        chosen = TokenizedRecords()
        for index in indices:
            start, end = self._starts[index], self._starts[index + 1]
            chosen._ids.extend(self._ids[start:end])
            chosen._trained.extend(self._trained[start:end])
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
