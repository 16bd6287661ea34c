"""Answers in the records' order: lines of JSON, kept in parts that an attempt commits one by one, and put together at the end."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from server.domain.errors import ErrorData
from server.domain.events import BatchAdvanced, CheckpointSaved, ChildEvent
from server.domain.generation import PositionLogprobs
from server.domain.jobs import BATCH_RESULT_NAME, BatchCounters
from server.domain.orders import BatchOrder
from server.services.generating import Choice, Generation
from server.storage.artefacts import Artefact, ArtefactInvalid, ArtefactStore, Described

# A part is saved at the first of these: what a crash costs at most, and how many files a large job makes.
PART_RECORDS = 256
PART_BYTES = 8 << 20
PART_SECONDS = 10.0
# How often the job says how far it is.
PROGRESS_SECONDS = 1.0
_PART_NAME = "part.jsonl"


@dataclass(frozen=True, slots=True)
class Answered:
    """A line of the result, and what it counts."""

    line: bytes
    counters: BatchCounters
    error: ErrorData | None = None


def write_answer(number: int, line: int, generation: Generation) -> Answered:
    """Write the answers to a record. `number` counts records from 1, `line` is where it begins in the dataset's file."""
    usage = generation.finished.usage
    content = {
        "record": number,
        "line": line,
        "choices": [_write_choice(choice) for choice in generation.choices],
        "usage": asdict(usage),
        "dropped_message_count": generation.finished.choices[0].dropped_messages,
        "error": None,
    }
    return Answered(_dump(content), BatchCounters(1, 0, usage.prompt_tokens, usage.completion_tokens))


def write_failure(number: int, line: int, error: ErrorData) -> Answered:
    """Write why a record has no answer. It looks like an answered one, without choices."""
    fields = [{"field": each.field, "description": each.description} for each in error.violations]
    told = {"code": error.code, "reason": error.reason, "message": error.message, "field_violations": fields}
    usage = {"prompt_tokens": 0, "completion_tokens": 0}
    content = {"record": number, "line": line, "choices": [], "usage": usage, "dropped_message_count": 0, "error": told}
    return Answered(_dump(content), BatchCounters(failed_records=1), error)


def _write_choice(choice: Choice) -> dict[str, object]:
    written: dict[str, object] = {
        "text": choice.text,
        "finish_reason": choice.finished.finish_reason.value,
        "completion_tokens": choice.finished.usage.completion_tokens,
        "seed": choice.finished.seed,
    }
    return written | ({"logprobs": [_write_logprobs(each) for each in choice.logprobs]} if choice.logprobs else {})


def _write_logprobs(position: PositionLogprobs) -> dict[str, object]:
    return {**asdict(position.chosen), "alternatives": [asdict(each) for each in position.top]}


def _dump(content: Mapping[str, object]) -> bytes:
    # A model may generate half of a surrogate pair; escaped, it is JSON none the less.
    return json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n"


class BatchResults:
    """What a job has of its result: the committed parts of all attempts, and the lines since."""

    def __init__(self, order: BatchOrder, store: ArtefactStore, emit: Callable[[ChildEvent], None], total_records: int) -> None:
        """Check the parts that earlier attempts have committed. Raises ArtefactInvalid."""
        self._order = order
        self._store = store
        self._emit = emit
        self._total_records = total_records
        self._paths = list(order.part_paths)
        self._lines: list[bytes] = []
        self.counters = self._saved = BatchCounters()
        for path in self._paths:
            self.counters = self._saved = _continue(self._saved, store.open(path))
        self.first_error: ErrorData | None = None
        self._began = self._next_part = self._next_progress = time.monotonic()
        self._next_part += PART_SECONDS
        self._first = self.counters

    def add(self, answered: Answered) -> None:
        """Take the next record's line."""
        self._lines.append(answered.line)
        self.counters = _sum(self.counters, answered.counters)
        self.first_error = self.first_error or answered.error
        if time.monotonic() >= self._next_progress:
            self._report()
        is_large = len(self._lines) >= PART_RECORDS or sum(map(len, self._lines)) >= PART_BYTES
        if is_large or time.monotonic() >= self._next_part:
            self.save()

    def save(self) -> None:
        """Keep what has come since the last part as another one. Raises DiskFull."""
        if not self._lines:
            return
        path = f"{self._order.job_path}/checkpoint-{self.counters.records}-{self._order.lease_epoch}"

        def fill(directory: Path) -> Mapping[str, Described]:
            (directory / _PART_NAME).write_bytes(b"".join(self._lines))
            return {"kind": "batch_part", "records_before": self._saved.records, **asdict(self.counters)}

        part = self._store.write(path, fill)
        self._report()
        self._emit(CheckpointSaved(self.counters.records, path, part.size_bytes))
        self._paths.append(path)
        self._lines, self._saved = [], self.counters
        self._next_part = time.monotonic() + PART_SECONDS

    def finish(self) -> Artefact:
        """Write the parts one after the other as the result. Raises DiskFull, ArtefactInvalid."""

        def fill(directory: Path) -> Mapping[str, Described]:
            with (directory / BATCH_RESULT_NAME).open("wb") as result:
                for path in self._paths:
                    with (self._store.open(path).directory / _PART_NAME).open("rb") as part:
                        shutil.copyfileobj(part, result)
            return {"kind": "batch_generation", **asdict(self.counters)}

        return self._store.write(self._order.artifact_path, fill)

    def _report(self) -> None:
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        seconds, done = time.monotonic() - self._began, self.counters.records - self._first.records
        left = max(0, self._total_records - self.counters.records)
        speed = (self.counters.tokens - self._first.tokens) / seconds if seconds else 0.0
        self._emit(BatchAdvanced(self.counters, self._total_records, speed, left * seconds / done if done else None))


def _continue(before: BatchCounters, part: Artefact) -> BatchCounters:
    """Read what there is with a part. Raises ArtefactInvalid for one that does not begin where the last one ended."""
    description = part.description
    counted = {name: description.get(name) for name in asdict(before)}
    if description.get("records_before") != before.records or not all(isinstance(count, int) for count in counted.values()):
        raise ArtefactInvalid("A part of the result does not follow the one before it.")
    return BatchCounters(**{name: int(str(count)) for name, count in counted.items()})


def _sum(one: BatchCounters, other: BatchCounters) -> BatchCounters:
    return BatchCounters(*(getattr(one, name) + getattr(other, name) for name in asdict(one)))
