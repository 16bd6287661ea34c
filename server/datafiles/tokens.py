"""Records as token ids and weights, held flat in memory: what training reads its batches from."""

from array import array
from collections.abc import Sequence

import numpy as np

TokenIds = np.ndarray[tuple[int], np.dtype[np.int32]]
Starts = np.ndarray[tuple[int], np.dtype[np.int64]]
Lines = np.ndarray[tuple[int], np.dtype[np.int32]]
TrainedMask = np.ndarray[tuple[int], np.dtype[np.bool_]]
Weights = np.ndarray[tuple[int], np.dtype[np.float32]]


class TokenizedRecords:
    """Records as sequences of token ids with one weight per token: 8 bytes per token, and 12 per sequence.

    A record is one sequence, or two: the chosen and the rejected one of a preference pair.
    """

    def __init__(self, sequences_per_record: int = 1) -> None:
        self.sequences_per_record = sequences_per_record
        self._ids = array("i")
        self._weights = array("f")
        self._starts = array("q", [0])
        self._lines = array("i")

    def __len__(self) -> int:
        return (len(self._starts) - 1) // self.sequences_per_record

    @property
    def sequence_count(self) -> int:
        """The sequences of all records."""
        return len(self._starts) - 1

    @property
    def token_count(self) -> int:
        """The tokens of all sequences."""
        return len(self._ids)

    def append(self, token_ids: Sequence[int], weights: Sequence[float], line: int = 0) -> None:
        """Add a sequence; a weight of 0 leaves its token untrained. The first token has no predecessor and is never trained.

        `line` is its record's in the file, from 1.
        """
        self._ids.extend(token_ids)
        self._weights.extend(weights)
        if len(token_ids):
            self._weights[self._starts[-1]] = 0.0
        self._starts.append(len(self._ids))
        self._lines.append(line)

    def line_of(self, record: int) -> int:
        """Give the line of the file that a record comes from, from 1; 0 where it comes from none."""
        return self._lines[record * self.sequences_per_record]

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
        """Give what each token counts; 0: it is not trained."""
        return np.array(self._weights[self._starts[sequence] : self._starts[sequence + 1]], dtype=np.float32)

    def trained_mask(self, sequence: int) -> TrainedMask:
        """Tell which tokens of a sequence are trained."""
        return self.weights(sequence) > 0.0

    def count_trained(self) -> int:
        """Count the trained tokens of all sequences."""
        return int(np.count_nonzero(np.frombuffer(self._weights, dtype=np.float32))) if len(self._weights) else 0

    def select(self, records: Sequence[int]) -> "TokenizedRecords":
        """Give a copy with only these records."""
        chosen = TokenizedRecords(self.sequences_per_record)
        for sequence in (sequence for record in records for sequence in self.sequences_of(record)):
            start, end = self._starts[sequence], self._starts[sequence + 1]
            chosen._ids.extend(self._ids[start:end])
            chosen._weights.extend(self._weights[start:end])
            chosen._starts.append(len(chosen._ids))
            chosen._lines.append(self._lines[sequence])
        return chosen

    def to_arrays(self) -> dict[str, "np.ndarray[tuple[int], np.dtype[np.generic]]"]:
        """Give the flat arrays, for keeping them in a file."""
        return {
            "ids": np.array(self._ids, dtype=np.int32),
            "weights": np.array(self._weights, dtype=np.float32),
            "starts": np.array(self._starts, dtype=np.int64),
            "lines": np.array(self._lines, dtype=np.int32),
        }

    @classmethod
    def from_arrays(cls, sequences_per_record: int, ids: TokenIds, weights: Weights, starts: Starts, lines: Lines) -> "TokenizedRecords":
        """Take up what `to_arrays` gave. Raises ValueError where the parts do not fit together."""
        is_whole = len(ids) == len(weights) and len(starts) == len(lines) + 1
        if not is_whole or starts[0] != 0 or starts[-1] != len(ids) or np.any(np.diff(starts) < 0):
            raise ValueError("the arrays do not fit together")
        records = cls(sequences_per_record)
        records._ids.frombytes(ids.astype(np.int32).tobytes())
        records._weights.frombytes(weights.astype(np.float32).tobytes())
        records._starts = array("q", starts.astype(np.int64).tobytes())
        records._lines.frombytes(lines.astype(np.int32).tobytes())
        return records
