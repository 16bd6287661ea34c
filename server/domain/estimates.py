"""What a job is expected to need, and whether it fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from server.domain.findings import Finding


class Verdict(StrEnum):
    """Whether a job fits on this machine."""

    FITS = "FITS"
    FITS_WITH = "FITS_WITH"
    DOES_NOT_FIT = "DOES_NOT_FIT"


@dataclass(frozen=True, slots=True)
class Range:
    """A figure and how far it may be off."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory, disk (bytes), steps, tokens and time (seconds) of a job. None: not known, or there is no such thing."""

    verdict: Verdict
    memory_bytes: Range | None = None
    device_memory_bytes: Range | None = None
    disk_bytes: Range | None = None
    steps: Range | None = None
    tokens: Range | None = None
    duration_seconds: Range | None = None
    findings: Sequence[Finding] = ()
