"""What embedding texts gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class EmbeddingBackend(StrEnum):
    """In which numbers an embedding model computes.

    BFLOAT16 is faster where the processor multiplies it, and half as large. INT8 multiplies bytes: a quarter as large, its tables of words
    apart, and faster where the processor does that (VNNI, AMX); it is refused on others.
    """

    FLOAT32 = "FLOAT32"
    BFLOAT16 = "BFLOAT16"
    INT8 = "INT8"


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One unit vector per text, each of `dimension` numbers in float32.

    `token_counts` are those of the whole texts, special tokens and prefix included; what is beyond `max_tokens` was not read.
    `fingerprint` is that of the space that all vectors are in; empty: not of one.
    """

    vectors: Sequence[Sequence[float]]
    dimension: int
    token_counts: Sequence[int]
    max_tokens: int
    fingerprint: str = ""
