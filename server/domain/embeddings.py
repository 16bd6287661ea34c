"""What embedding texts gives."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One unit vector per text, each of `dimension` numbers in float32.

    `token_counts` are those of the whole texts, special tokens and prefix included; what is beyond `max_tokens` was not read.
    """

    vectors: Sequence[Sequence[float]]
    dimension: int
    token_counts: Sequence[int]
    max_tokens: int
