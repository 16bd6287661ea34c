"""What a job trains and what it evaluates: the records of its datasets as tokens, checked, split, and told of in events.

Reading needs no model: it can run ahead while one is loaded.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from server.datafiles.preparation import Preparation, Rules
from server.datafiles.tokencache import TokenCache, make_key
from server.datafiles.tokenizing import Report, tokenize_file
from server.datafiles.tokens import TokenizedRecords
from server.datafiles.unpacking import FileInvalid
from server.diskfiles import hash_file
from server.domain.events import ChildEvent, DataChecked, Preparing
from server.domain.findings import Finding, Severity
from server.domain.jobs import FailureReason, JobFailure
from server.domain.orders import DatasetFile, FineTuneOrder
from server.domain.specs import FineTuneSpec, OverlongPolicy

PROGRESS_SECONDS = 1.0

Emit = Callable[[ChildEvent], None]
Locate = Callable[[str], Path]
Check = Callable[[], None]  # raises where the job shall end


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The records to train and those held out for evaluation, which may be none."""

    train: TokenizedRecords
    held_out: TokenizedRecords


class Reading:
    """A reading that runs in a thread of its own since it was made."""

    def __init__(self, read: Callable[[Check], TrainingData]) -> None:
        self._is_unwanted = threading.Event()
        self._data: TrainingData | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(read,), name="reading", daemon=True)
        self._thread.start()

    def result(self) -> TrainingData:
        """Wait for the records. Raises what the reading raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._data is not None
        return self._data

    def cancel(self) -> None:
        """End it soon: nobody will ask for its result."""
        self._is_unwanted.set()
        self._thread.join()

    def _run(self, read: Callable[[Check], TrainingData]) -> None:
        try:
            self._data = read(self._check)
        except BaseException as error:  # raised again where the result is wanted
            self._error = error

    def _check(self) -> None:
        if self._is_unwanted.is_set():
            raise InterruptedError("the records are not wanted any more")


def start_reading(
    order: FineTuneOrder,
    locate: Locate,
    cache: TokenCache | None,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    emit: Emit,
    check: Check,
) -> Reading:
    """Begin `read_training_data` ahead, in another thread: the tokenizer works outside of Python's lock."""

    def read(check_wanted: Check) -> TrainingData:
        def check_both() -> None:
            check_wanted()
            check()

        return read_training_data(order, locate, cache, tokenizer, max_tokens, emit, check_both)

    return Reading(read)


def read_training_data(
    order: FineTuneOrder,
    locate: Locate,
    cache: TokenCache | None,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    emit: Emit,
    check: Check,
) -> TrainingData:
    """Read all records of an order; emits Preparing and DataChecked. `check` is called now and then and may raise.

    Raises JobFailure(DATASET_INVALID) for data that cannot be trained as asked, naming lines and counts.
    """
    began = time.perf_counter()
    files = _Files(locate, cache, tokenizer, make_rules(order.spec, max_tokens), emit, check)
    files.total_records = order.dataset.record_count + (order.eval_dataset.record_count if order.eval_dataset else 0)
    records, report = files.read(order.dataset)
    reports, held_out = [report], None
    if order.eval_dataset is not None:
        held_out, eval_report = files.read(order.eval_dataset)
        reports.append(eval_report)
    is_usable = len(records) > 0 and not any(each.fatal for each in reports)
    if held_out is None:
        records, held_out = split_held_out(records, order.spec.eval_fraction, order.spec.parameters.seed)
    findings = [*merge_findings(reports), *find_overlap(records, held_out)]
    emit(
        DataChecked(
            train_sequences=records.sequence_count,
            eval_sequences=held_out.sequence_count,
            tokens=records.token_count + held_out.token_count,
            trained_tokens=records.count_trained() + held_out.count_trained(),
            dropped_records=sum(each.dropped_records + each.invalid_records for each in reports),
            cut_records=sum(each.cut_records for each in reports),
            lengths=sum_lengths(reports).list_buckets(),
            findings=findings,
            duration_seconds=time.perf_counter() - began,
            cached=files.all_cached,
        )
    )
    if not is_usable:
        refuse(reports, files.rules)
    return TrainingData(records, held_out)


def make_rules(spec: FineTuneSpec, max_tokens: int) -> Rules:
    """Give the rules by which a job's records become sequences; `max_tokens` is what its model takes at most."""
    parameters = spec.parameters
    longest = min(parameters.max_sequence_tokens, max_tokens)
    return Rules(longest, parameters.overlong_policy, parameters.loss_on, parameters.objective.needs_pairs)


@dataclass(slots=True)
class _Files:
    """Reads the files of one order, and tells how far it is over all of them."""

    locate: Locate
    cache: TokenCache | None
    tokenizer: PreTrainedTokenizerBase
    rules: Rules
    emit: Emit
    check: Check
    total_records: int = 0
    all_cached: bool = True
    _read: int = 0
    _tokens: int = 0
    _told: float = 0.0

    def read(self, file: DatasetFile) -> tuple[TokenizedRecords, Report]:
        """Give the tokens of a file, from the cache where they are there."""
        key = make_key(file, self.tokenizer, self.rules) if self.cache is not None else None
        if self.cache is not None and key is not None and (found := self.cache.find(key)):
            return found
        self.all_cached = False
        path = self.locate(file.path)
        self.emit(Preparing(self._read, self.total_records, self._tokens))
        try:
            if hash_file(path) != file.sha256:
                raise FileInvalid("FILE_CHANGED", "its bytes are not those that were uploaded")
            records, report = tokenize_file(path, file, Preparation(self.tokenizer, self.rules), self._tell)
        except (FileInvalid, OSError) as error:
            message = f"A dataset of the job cannot be read: {error if isinstance(error, FileInvalid) else 'its file is missing'}."
            raise JobFailure(FailureReason.DATASET_INVALID, message, "Upload the dataset again and start a new job on it.") from error
        self._read += file.record_count
        self._tokens += records.token_count
        self.emit(Preparing(self._read, self.total_records, self._tokens))
        if self.cache is not None and key is not None:
            self.cache.keep(key, records, report)
        return records, report

    def _tell(self, records: int, tokens: int) -> None:
        self.check()
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self.emit(Preparing(min(self._read + records, self.total_records), self.total_records, self._tokens + tokens))


def merge_findings(reports: Sequence[Report]) -> list[Finding]:
    """Add up the findings of several files, most frequent first."""
    merged: dict[str, Finding] = {}
    for finding in (finding for report in reports for finding in report.findings.values()):
        known = merged.get(finding.code)
        merged[finding.code] = replace(known, count=(known.count or 0) + (finding.count or 0)) if known else finding
    return sorted(merged.values(), key=lambda finding: -(finding.count or 0))


def sum_lengths(reports: Sequence[Report]) -> Report:
    """Give a report that has the lengths of all."""
    merged = Report()
    for report in reports:
        merged.lengths.update(report.lengths)
    return merged


def find_overlap(train: TokenizedRecords, held_out: TokenizedRecords) -> list[Finding]:
    """Say how many held-out records are trained as well, token by token, and name the first: their loss shows what was learnt by heart."""
    if not len(held_out):
        return []

    def digest(records: TokenizedRecords, record: int) -> tuple[bytes, ...]:
        return tuple(records.token_ids(sequence).tobytes() for sequence in records.sequences_of(record))

    evaluated = {hash(digest(held_out, record)) for record in range(len(held_out))}
    trained = evaluated & {hash(digest(train, record)) for record in range(len(train))}
    lines = [held_out.line_of(record) for record in range(len(held_out)) if hash(digest(held_out, record)) in trained]
    message = "Records that are held out for evaluation are trained as well: their loss says little about new data."
    return [Finding(min(lines), "TRAIN_EVAL_OVERLAP", message, Severity.WARNING, count=len(lines))] if lines else []


def refuse(reports: Sequence[Report], rules: Rules) -> None:
    """Say why nothing can be trained. Raises JobFailure(DATASET_INVALID)."""
    for report in reports:
        if report.fatal:
            raise _explain(report, report.fatal[0], rules.max_tokens)
    message = "No record is left to train on."
    if any("OVERLONG" in report.findings for report in reports) and rules.overlong_policy is OverlongPolicy.DROP:
        message = f"No record is left to train on: all have more than {rules.max_tokens} tokens or are no records."
    raise JobFailure(FailureReason.DATASET_INVALID, message, "Upload a dataset with at least one good record.")


def _explain(report: Report, worst: Finding, max_tokens: int) -> JobFailure:
    named = report.lines[worst.code]
    lines = ", ".join(map(str, named)) + (", …" if (worst.count or 0) > len(named) else "")
    if worst.code == "OVERLONG":
        return JobFailure(
            FailureReason.DATASET_INVALID,
            f"{worst.count} records have more than {max_tokens} tokens (lines {lines}; the longest has {report.longest_tokens}).",
            f"Raise max_sequence_tokens to {report.longest_tokens}, shorten these records, or choose another overlong policy.",
        )
    others = "".join(f" {finding.count} more have {finding.code}." for finding in report.fatal[1:])
    return JobFailure(
        FailureReason.DATASET_INVALID,
        f"{worst.count} records cannot be trained (lines {lines}): {worst.code}: {worst.message}{others}",
        "Change or remove these records. A preview of the dataset shows them as the base model reads them.",
    )


def split_held_out(records: TokenizedRecords, fraction: float, seed: int) -> tuple[TokenizedRecords, TokenizedRecords]:
    """Split off `fraction` of the records (rounded down) for evaluation: the same ones for the same seed."""
    held_out = int(len(records) * fraction)
    order = np.random.Generator(np.random.PCG64([seed, 2**32 - 1])).permutation(len(records)).tolist()
    return records.select(sorted(order[held_out:])), records.select(sorted(order[:held_out]))
