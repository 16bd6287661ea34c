"""The look through a file of records before it is taken: each record once, in bounded memory, with no model.

Runs as a process of its own (`python -m server inspect`), which gives up every right that it does not need before it opens the file.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from server.datafiles.reading import NumberedRecord, read_records, recognise_form
from server.datafiles.unpacking import FileInvalid
from server.domain.datasets import DatasetFormat, Inspection, InspectionOrder, InspectionProgress, RecordKind
from server.domain.findings import Finding, Severity
from server.domain.records import Record, RecordInvalid

MAX_SAMPLED_FINDINGS = 100  # kept with the dataset; the counts cover all
MAX_SAMPLED_OF_A_CODE = 20  # so that many equal ones do not hide the others
MAX_DIGESTS = 2_000_000  # of records seen, for finding equal ones: some 200 MB
SHORT_CHARACTERS = 5
LONG_CHARACTERS = 100_000  # some 25,000 tokens: over what most training takes
PROGRESS_SECONDS = 0.5

# The process may take so much address space (pyarrow maps far more than it uses), and so long a time.
MAX_MEMORY_BYTES = 4 << 30
BASE_CPU_SECONDS = 60
BYTES_PER_CPU_SECOND = 8 << 20  # a third of what was measured
MAX_OPEN_FILES = 64


@dataclass(slots=True)
class _Count:
    """What is known of one code."""

    first: Finding
    count: int = 0


@dataclass(slots=True)
class _Scan:
    """What one pass over the records has found so far."""

    good: int = 0
    bad: int = 0
    kinds: Counter[RecordKind] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, _Count] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def add(self, numbered: NumberedRecord) -> None:
        """Look at one record."""
        record = numbered.record
        if isinstance(record, RecordInvalid):
            self.bad += 1
            self.note(record.to_finding(numbered.line))
            return
        self.good += 1
        self.kinds[record.kind] += 1
        for code, message in self._judge(record):
            self.note(Finding(numbered.line, code, message, Severity.WARNING))

    def note(self, finding: Finding) -> None:
        """Count a finding, and keep it while there are few."""
        known = self.counts.setdefault(finding.code, _Count(finding))
        known.count += 1
        if len(self.findings) < MAX_SAMPLED_FINDINGS and known.count <= MAX_SAMPLED_OF_A_CODE:
            self.findings.append(finding)

    def _judge(self, record: Record) -> list[tuple[str, str]]:
        texts = record.texts
        length = sum(map(len, texts))
        found = []
        if length < SHORT_CHARACTERS:
            found.append(("VERY_SHORT", f"The record has {length} characters in all."))
        if length > LONG_CHARACTERS:
            found.append(("VERY_LONG", f"The record has {length:,} characters: more tokens than most training takes."))
        if any("\ufffd" in text for text in texts):
            found.append(("UNDECODED_TEXT", "The text has replacement characters: it was decoded wrongly before it came here."))
        if self._was_seen(record):
            found.append(("DUPLICATE", "The same record stands before it: it is trained that much oftener."))
        return found

    def _was_seen(self, record: Record) -> bool:
        content = "\x00".join((record.kind, *record.texts))
        digest = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")
        if digest in self.seen:
            return True
        if len(self.seen) < MAX_DIGESTS:
            self.seen.add(digest)
        return False

    def count_findings(self) -> list[Finding]:
        """Give one finding per code, most frequent first."""
        found = [replace(known.first, count=known.count) for known in self.counts.values()]
        if len(self.kinds) > 1:
            kinds = ", ".join(f"{count} {kind.value}" for kind, count in self.kinds.most_common())
            found.append(Finding(None, "MIXED_KINDS", f"The records are of several kinds: {kinds}.", Severity.WARNING, count=self.good))
        return sorted(found, key=lambda finding: -(finding.count or 0))


def inspect(order: InspectionOrder, report: Callable[[InspectionProgress], None]) -> Inspection:
    """Look through a file. What is wrong with it is said in the result, never raised."""
    scan = _Scan()
    path, error = Path(order.path), None
    form = None
    told = time.monotonic()
    try:
        form = recognise_form(path, order.format)
        for numbered in read_records(path, form, order.record_kind or RecordKind.MIXED, max_unpacked_bytes=order.max_bytes):
            scan.add(numbered)
            if numbered.number % 256 == 0 and time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                report(InspectionProgress(numbered.number))
    except FileInvalid as invalid:
        error = invalid
    except MemoryError:
        error = FileInvalid("FILE_TOO_LARGE", "Reading the file takes more memory than any records should.")
    return Inspection(
        format=form.format if form else order.format or DatasetFormat.JSONL,
        compression=form.compression if form else None,
        record_kind=next(iter(scan.kinds)) if len(scan.kinds) == 1 else RecordKind.MIXED,
        record_count=scan.good,
        invalid_record_count=scan.bad,
        findings=tuple(scan.findings),
        finding_counts=tuple(scan.count_findings()),
        error_code=error.code if error else "",
        error=str(error) if error else "",
    )


def run_inspection() -> int:
    """Do the order on standard input; messages go to standard output, one JSON object a line. Gives the exit code."""
    order = _read_order(json.loads(sys.stdin.buffer.readline()))
    _limit_process(order)

    def write(message: InspectionProgress | Inspection) -> None:
        sys.stdout.buffer.write(json.dumps(asdict(message)).encode() + b"\n")
        sys.stdout.buffer.flush()

    write(inspect(order, write))
    return 0


def _read_order(value: Mapping[str, str | int | None]) -> InspectionOrder:
    form, kind = value.get("format"), value.get("record_kind")
    return InspectionOrder(
        path=str(value["path"]),
        max_bytes=int(value["max_bytes"] or 0),
        format=DatasetFormat(str(form)) if form else None,
        record_kind=RecordKind(str(kind)) if kind else None,
    )


def _limit_process(order: InspectionOrder) -> None:
    """Take away what a damaged or hostile file could use: memory, time, the disk, other processes."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads any more: end
    seconds = BASE_CPU_SECONDS + order.max_bytes // BYTES_PER_CPU_SECOND
    for limit, value in (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    os.nice(5)
