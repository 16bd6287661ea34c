"""Records as a base model reads them, for a person to look at."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.domain.findings import Finding
from server.domain.orders import DatasetFile
from server.domain.specs import LossOn, OverlongPolicy


@dataclass(frozen=True, slots=True)
class PreviewOrder:
    """Which records (numbers from 1, rising) of which file to show, read by which model under which rules.

    `needs_pairs`: as an objective reads them that learns from preference pairs.
    """

    base_model: str
    dataset: DatasetFile
    records: Sequence[int]
    max_sequence_tokens: int
    overlong_policy: OverlongPolicy
    loss_on: LossOn
    needs_pairs: bool
    max_tokens_shown: int


@dataclass(frozen=True, slots=True)
class MeasureOrder:
    """Whose tokens to count: some records (numbers from 1, rising) of a file or, without one, JSON `lines` that are not stored yet."""

    base_model: str
    dataset: DatasetFile | None
    records: Sequence[int]
    lines: Sequence[str]
    needs_pairs: bool


@dataclass(frozen=True, slots=True)
class PreviewedToken:
    """A token. `weight` 0: it is not trained."""

    token_id: int
    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class PreviewedSequence:
    """A sequence that is trained as one; `tokens` are its first."""

    name: str
    tokens: Sequence[PreviewedToken]
    token_count: int
    trained_token_count: int


@dataclass(frozen=True, slots=True)
class PreviewedRecord:
    """A record with what is trained of it (nothing: it cannot be used or is dropped) and what was found."""

    record: int
    line: int
    sequences: Sequence[PreviewedSequence] = ()
    findings: Sequence[Finding] = ()


@dataclass(frozen=True, slots=True)
class Preview:
    """The records that were asked for, those that are there, and the hash of the chat template that was used."""

    records: Sequence[PreviewedRecord]
    template_sha256: str
