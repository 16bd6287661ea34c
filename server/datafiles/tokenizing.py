"""A dataset's file to token arrays and a report of what was found: read, prepared in batches, counted."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from server.datafiles.preparation import Preparation, PreparedRecord
from server.datafiles.reading import NumberedRecord, read_records, recognise_form
from server.datafiles.tokens import TokenizedRecords
from server.domain.events import LengthBucket
from server.domain.findings import Finding, Severity
from server.domain.orders import DatasetFile
from server.domain.records import Record

BATCH_RECORDS = 256
BATCH_CHARACTERS = 4 << 20  # long records are prepared few at a time
MAX_NAMED_LINES = 5
SMALLEST_BUCKET_TOKENS = 32

# Is told the records read and the tokens made so far; may raise to end the reading.
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Report:
    """What was found in a file: one finding per code, with its count and the line of its first; `lines` has some more of them.

    `invalid_records` are those that the upload counted so, which are left out; other findings that are ERROR stop a job.
    """

    findings: dict[str, Finding] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    longest_tokens: int = 0
    invalid_records: int = 0
    dropped_records: int = 0
    cut_records: int = 0

    @property
    def fatal(self) -> Sequence[Finding]:
        """The findings that forbid to train, most frequent first."""
        errors = [finding for finding in self.findings.values() if finding.severity is Severity.ERROR]
        return sorted(errors, key=lambda finding: -(finding.count or 0))

    def add(self, prepared: PreparedRecord) -> None:
        """Count a record."""
        for length in prepared.lengths:
            self.lengths[_find_bucket(length)] += 1
            self.longest_tokens = max(self.longest_tokens, length)
        self.dropped_records += prepared.is_dropped
        self.cut_records += prepared.is_cut
        self.invalid_records += prepared.is_invalid
        for finding in prepared.findings:
            # Left out since the upload, which has said so: no reason to stop.
            severity = Severity.WARNING if prepared.is_invalid else finding.severity
            known = self.findings.get(finding.code)
            self.findings[finding.code] = replace(known or finding, severity=severity, count=(known.count or 0) + 1 if known else 1)
            lines = self.lines.setdefault(finding.code, [])
            if len(lines) < MAX_NAMED_LINES:
                lines.append(prepared.line)

    def list_buckets(self) -> Sequence[LengthBucket]:
        """Give the histogram of the lengths, shortest first."""
        return [LengthBucket(up_to, count) for up_to, count in sorted(self.lengths.items())]


def _find_bucket(length: int) -> int:
    return max(SMALLEST_BUCKET_TOKENS, 1 << (length - 1).bit_length())


def tokenize_file(path: Path, file: DatasetFile, preparation: Preparation, progress: Progress) -> tuple[TokenizedRecords, Report]:
    """Read a whole file. Raises FileInvalid, and what `progress` raises."""
    records = TokenizedRecords(sequences_per_record=preparation.sequences_per_record)
    report = Report()
    read = 0
    for batch in _read_batches(read_records(path, recognise_form(path, file.format), file.record_kind)):
        for prepared in preparation.prepare(batch):
            report.add(prepared)
            for sequence in prepared.sequences:
                records.append(sequence.token_ids, sequence.weights, prepared.line)
        read += len(batch)
        progress(read, records.token_count)
    return records, report


def _read_batches(numbered: Iterator[NumberedRecord]) -> Iterator[list[NumberedRecord]]:
    batch: list[NumberedRecord] = []
    characters = 0
    for record in numbered:
        batch.append(record)
        characters += sum(map(len, record.record.texts)) if isinstance(record.record, Record) else 0
        if len(batch) >= BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
