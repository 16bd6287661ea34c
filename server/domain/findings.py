"""What checks find in datasets, documents and configurations."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "ERROR"  # the record or configuration cannot be used
    WARNING = "WARNING"  # it can, but the result may disappoint


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: the line (from 1; None: about the whole), a stable code and a sentence.

    `count` is set where it stands for many of its code.
    """

    line: int | None
    code: str
    message: str
    severity: Severity = Severity.ERROR
    field: str = ""
    count: int | None = None
