"""Dataset files to records, in pieces of bounded size: JSONL, JSON, CSV and Parquet, plain, gzip or Zstandard.

A stranger's file is read here first in a process of its own, under limits (see inspector.py); what it has accepted is read again
for preview and training by the same functions.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from server.datafiles.unpacking import FileInvalid, recognise_compression, unpack
from server.domain.datasets import Compression, DatasetFormat, RecordKind
from server.domain.record_forms import parse_json, parse_value
from server.domain.records import MAX_RECORD_BYTES, Record, RecordInvalid, make_too_long

READ_CHARACTERS = 1 << 20
PARQUET_BATCH_RECORDS = 64  # at most 64 of the largest records are in memory at once
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Columns of a CSV file whose cells may hold JSON.
JSON_COLUMNS = frozenset({"messages", "conversations", "tools", "prompt", "completion", "chosen", "rejected"})
CSV_DELIMITERS = (",", ";", "\t")
KNOWN_COLUMNS = JSON_COLUMNS | {"text", "instruction", "input", "output", "system"}


@dataclass(frozen=True, slots=True)
class FileForm:
    """How a file is written and packed."""

    format: DatasetFormat
    compression: Compression | None


@dataclass(frozen=True, slots=True)
class NumberedRecord:
    """A record, or what is wrong with it. `number` counts records from 1, `line` is where it begins (of JSON and Parquet: the number)."""

    number: int
    line: int
    record: Record | RecordInvalid


# A value of the file, not yet a record; or why there is none.
Value = object | RecordInvalid


def recognise_form(path: Path, wanted: DatasetFormat | None = None) -> FileForm:
    """Tell how a file is written, by its first bytes; `wanted` is taken at its word. Raises FileInvalid."""
    compression = recognise_compression(path)
    with unpack(path, compression) as file:
        head = file.read(1 << 16)
    is_parquet = head.startswith(b"PAR1")
    if is_parquet and compression is not None:
        raise FileInvalid("PACKED_PARQUET", "Parquet packs its columns itself: send the Parquet file without packing it again.")
    if wanted is not None:
        if (wanted is DatasetFormat.PARQUET) != is_parquet:
            raise FileInvalid("WRONG_FORMAT", f"The file is {'a' if is_parquet else 'not a'} Parquet file.")
        return FileForm(wanted, compression)
    if is_parquet:
        return FileForm(DatasetFormat.PARQUET, None)
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"["):
        return FileForm(DatasetFormat.JSON, compression)
    header = text.split(b"\n", 1)[0].decode("utf-8", "replace")
    is_csv = not text.startswith(b"{") and bool(KNOWN_COLUMNS & set(_split_header(header)))
    return FileForm(DatasetFormat.CSV if is_csv else DatasetFormat.JSONL, compression)


def read_records(
    path: Path, form: FileForm, kind: RecordKind = RecordKind.MIXED, *, max_unpacked_bytes: int | None = None
) -> Iterator[NumberedRecord]:
    """Read a file from its beginning. Raises FileInvalid where it cannot be read on, or unpacks to more than the limit."""
    is_parquet = form.format is DatasetFormat.PARQUET
    values = _read_parquet(path, max_unpacked_bytes) if is_parquet else _read_text(path, form, max_unpacked_bytes)
    for number, (line, value) in enumerate(values, start=1):
        yield NumberedRecord(number, line or number, _parse(value, kind))


def pick_records(path: Path, form: FileForm, kind: RecordKind, numbers: Collection[int]) -> Iterator[NumberedRecord]:
    """Read some records by their numbers, in the file's order, and of JSON lines nothing but them. Raises FileInvalid."""
    wanted, last = frozenset(numbers), max(numbers, default=0)
    if form.format is DatasetFormat.JSONL:
        yield from _pick_lines(path, form, kind, wanted, last)
        return
    for numbered in read_records(path, form, kind):
        if numbered.number in wanted:
            yield numbered
        if numbered.number >= last:
            return


def _pick_lines(path: Path, form: FileForm, kind: RecordKind, wanted: Set[int], last: int) -> Iterator[NumberedRecord]:
    with unpack(path, form.compression) as file:
        for number, (line, data) in enumerate(_read_filled_lines(file), start=1):
            if number > last:
                return
            if number in wanted:
                yield NumberedRecord(number, line, _parse(_read_line(data), kind))


def _parse(value: Value, kind: RecordKind) -> Record | RecordInvalid:
    if isinstance(value, RecordInvalid):
        return value
    try:
        return parse_value(value, kind)
    except RecordInvalid as error:
        return error


def _read_text(path: Path, form: FileForm, max_unpacked_bytes: int | None) -> Iterator[tuple[int, Value]]:
    readers: Mapping[DatasetFormat, Callable[[io.BufferedIOBase], Iterator[tuple[int, Value]]]] = {
        DatasetFormat.JSONL: _read_jsonl,
        DatasetFormat.JSON: _read_json,
        DatasetFormat.CSV: _read_csv,
    }
    with unpack(path, form.compression, max_unpacked_bytes) as file:
        yield from readers[form.format](file)


def _read_jsonl(file: io.BufferedIOBase) -> Iterator[tuple[int, Value]]:
    for line, data in _read_filled_lines(file):
        yield line, _read_line(data)


def _read_filled_lines(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    return ((line, data) for line, data in _read_lines(file) if data.strip())


def _read_line(data: bytes) -> Value:
    return _attempt(lambda: parse_json(data))


def _attempt(read: Callable[[], object]) -> Value:
    try:
        return read()
    except RecordInvalid as error:
        return error


def _read_lines(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Number the lines from 1. One that is longer than a record may be comes cut, still too long."""
    number = 0
    while line := file.readline(MAX_RECORD_BYTES + 2):
        number += 1
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)  # some editors write it
        while not line.endswith(b"\n") and (rest := file.readline(MAX_RECORD_BYTES)):
            line = line[: MAX_RECORD_BYTES + 1] + rest[-1:]
        yield number, line


def _read_csv(file: io.BufferedIOBase) -> Iterator[tuple[int, Value]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = (data.decode("utf-8", "surrogateescape") for _, data in _read_lines(file))
    first = next(lines, "")
    columns = _split_header(first)
    reader = csv.reader(lines, delimiter=_find_delimiter(first))
    while True:
        line = reader.line_num + 2  # the header is line 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield line, make_too_long()
            continue
        if any(cells):
            yield line, _attempt(lambda cells=cells: _read_row(columns, cells))  # type: ignore[misc]  # a default binds the loop's value


def _split_header(line: str) -> list[str]:
    return [name.strip().lower() for name in next(csv.reader([line.strip()], delimiter=_find_delimiter(line)), [])]


def _find_delimiter(header: str) -> str:
    """Give the delimiter that makes the most known columns of a header."""

    def count_known(delimiter: str) -> int:
        return len(KNOWN_COLUMNS & {name.strip(' "\r\n').lower() for name in header.split(delimiter)})

    return max(CSV_DELIMITERS, key=count_known)


def _read_row(columns: list[str], cells: list[str]) -> Mapping[str, object]:
    if len(cells) > len(columns):
        raise RecordInvalid("BROKEN_CSV", f"The row has {len(cells)} cells, the header {len(columns)}.")
    if sum(map(len, cells)) > MAX_RECORD_BYTES:
        raise make_too_long()
    row: dict[str, object] = dict(zip(columns, cells, strict=False))
    for name in JSON_COLUMNS & row.keys():
        cell = str(row[name]).strip()
        if name in ("messages", "conversations", "tools") or cell.startswith("[{"):
            if not cell:
                del row[name]
                continue
            row[name] = parse_json(cell.encode("utf-8", "surrogateescape"))
    return row


def _read_json(file: io.BufferedIOBase) -> Iterator[tuple[int, Value]]:
    """Read the values of an array one by one, however long it is."""
    buffer = _JsonBuffer(file)
    if buffer.next_character() != "[":
        yield 0, RecordInvalid("BROKEN_JSON", "The file does not begin with `[`.")
        return
    buffer.position += 1
    while (following := buffer.next_character()) not in ("]", ""):
        if following == ",":
            buffer.position += 1
            continue
        value = buffer.read_value()
        yield 0, value
        if isinstance(value, RecordInvalid):
            return  # where the next record begins cannot be told
    if not following:
        yield 0, RecordInvalid("BROKEN_JSON", "The file ends before its `]`.")


class _JsonBuffer:
    """A window on a long JSON text, moved on as values are read from it."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._scan = json.JSONDecoder().raw_decode
        self._text = ""
        self.position = 0

    def next_character(self) -> str:
        """Move to the next character that is not white space and give it; nothing at the end."""
        while True:
            while self.position < len(self._text) and self._text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._read_more():
                return ""

    def read_value(self) -> Value:
        """Read the value that begins here. What is not whole yet is tried again with more text, up to the size of a record."""
        while True:
            try:
                value, end = self._scan(self._text, self.position)
            except (ValueError, RecursionError) as error:
                is_too_long = len(self._text) - self.position > MAX_RECORD_BYTES
                if is_too_long or isinstance(error, RecursionError) or not self._read_more():
                    return make_too_long() if is_too_long else RecordInvalid("BROKEN_JSON", "The record is not JSON; no more is read.")
                continue
            if end < len(self._text) or not self._read_more():
                is_too_long = end - self.position > MAX_RECORD_BYTES
                self.position = end
                return make_too_long() if is_too_long else value

    def _read_more(self) -> bool:
        data = self._file.read(READ_CHARACTERS)
        self._text = self._text[self.position :] + self._decode(data, not data)
        self.position = 0
        return bool(data)


def _read_parquet(path: Path, max_unpacked_bytes: int | None) -> Iterator[tuple[int, Value]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
            if max_unpacked_bytes is not None and size > max_unpacked_bytes:
                raise FileInvalid("FILE_TOO_LARGE", f"Unpacked, the file has more than {max_unpacked_bytes:,} bytes.")
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_RECORDS):
                for row in batch.to_pylist():
                    yield 0, _attempt(lambda row=row: _check_row(row))  # type: ignore[misc]  # as above
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileInvalid):
            raise
        raise FileInvalid("BROKEN_FILE", f"The Parquet file cannot be read: {str(error)[:200]}") from error


def _check_row(row: Mapping[str, object]) -> object:
    value, size = _without_nothing(row)
    if size > MAX_RECORD_BYTES:
        raise make_too_long()
    return value


def _without_nothing(value: object) -> tuple[object, int]:
    """Leave out fields that are null, which Parquet writes for those that a record does not have. Gives the size of the texts too."""
    if isinstance(value, str):
        return value, len(value)
    if isinstance(value, list):
        items = [_without_nothing(item) for item in value]
        return [item for item, _ in items], sum(size for _, size in items)
    if isinstance(value, dict):
        fields = {name: _without_nothing(item) for name, item in value.items() if item is not None}
        return {name: item for name, (item, _) in fields.items()}, sum(size for _, size in fields.values())
    return value, 8
