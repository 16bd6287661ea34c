"""Reading files: every format and packing gives the same records, numbered, in bounded pieces; damage is named."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from server.datafiles.reading import FileForm, NumberedRecord, read_records, recognise_form
from server.datafiles.unpacking import FileInvalid
from server.domain.datasets import Compression, DatasetFormat, RecordKind
from server.domain.records import MAX_RECORD_BYTES, Record, RecordInvalid

ROWS: list[dict[str, object]] = [{"prompt": f"p{n}\nnext", "completion": f'c "{n}", or نعم'} for n in range(3)]
CHAT = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "tools": [{"type": "function", "function": {}}],
}


def write_jsonl(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode()


def write_json(rows: list[dict[str, object]]) -> bytes:
    return b"\xef\xbb\xbf" + json.dumps(rows, indent=2, ensure_ascii=False).encode()


def write_csv(rows: list[dict[str, object]]) -> bytes:
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows({name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()} for row in rows)
    return text.getvalue().encode()


def write_parquet(rows: list[dict[str, object]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue()


WRITERS: dict[DatasetFormat, Callable[[list[dict[str, object]]], bytes]] = {
    DatasetFormat.JSONL: write_jsonl,
    DatasetFormat.JSON: write_json,
    DatasetFormat.CSV: write_csv,
    DatasetFormat.PARQUET: write_parquet,
}
PACKERS: dict[Compression | None, Callable[[bytes], bytes]] = {
    None: lambda data: data,
    Compression.GZIP: gzip.compress,
    Compression.ZSTD: zstandard.compress,
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[NumberedRecord]]:
    def read(data: bytes, wanted: DatasetFormat | None = None, most: int | None = None) -> list[NumberedRecord]:
        path = tmp_path / "file"
        path.write_bytes(data)
        return list(read_records(path, recognise_form(path, wanted), max_unpacked_bytes=most))

    return read


Read = Callable[..., list[NumberedRecord]]


def codes(found: list[NumberedRecord]) -> list[tuple[int, str]]:
    return [(each.line, each.record.code if isinstance(each.record, RecordInvalid) else "") for each in found]


@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize("form", WRITERS)
def test_every_format_and_packing_is_recognised_and_gives_the_same_records(
    tmp_path: Path, form: DatasetFormat, compression: Compression | None
) -> None:
    path = tmp_path / "file"
    path.write_bytes(PACKERS[compression](WRITERS[form](ROWS)))
    if form is DatasetFormat.PARQUET and compression is not None:
        with pytest.raises(FileInvalid) as refusal:
            recognise_form(path)
        assert refusal.value.code == "PACKED_PARQUET"
        return
    assert recognise_form(path) == FileForm(form, compression)
    found = list(read_records(path, recognise_form(path)))
    assert [each.number for each in found] == [1, 2, 3]
    assert [each.line for each in found] == ([2, 4, 6] if form is DatasetFormat.CSV else [1, 2, 3])
    assert [each.record.texts for each in found if isinstance(each.record, Record)] == [
        (f"p{n}\nnext", f'c "{n}", or نعم') for n in range(3)
    ]


@pytest.mark.parametrize("form", WRITERS)
def test_nested_conversations_come_through_every_format(read: Read, form: DatasetFormat) -> None:
    (found,) = read(WRITERS[form]([CHAT] if form is not DatasetFormat.PARQUET else [{"messages": CHAT["messages"]}]))
    assert isinstance(found.record, Record)
    assert (found.record.kind, found.record.texts) == (RecordKind.CHAT, ("q", "a"))
    assert len(found.record.tools) == (0 if form is DatasetFormat.PARQUET else 1)


def test_fields_that_parquet_fills_with_nothing_are_not_there(read: Read) -> None:
    rows: list[dict[str, object]] = [{"text": "a b", "messages": None}, {"text": None, "messages": CHAT["messages"]}]
    kinds = [each.record.kind for each in read(write_parquet(rows)) if isinstance(each.record, Record)]
    assert kinds == [RecordKind.TEXT, RecordKind.CHAT]


def test_lines_are_counted_as_an_editor_counts_them(read: Read) -> None:
    good = b'{"text": "a"}\n'
    found = read(
        b"\xef\xbb\xbf" + good + b"\n  \n{broken\n" + b'{"text": "' + b"x" * (2 * MAX_RECORD_BYTES) + b'"}\n' + b'{"text": "\xff"}\n' + good
    )
    assert codes(found) == [(1, ""), (4, "BROKEN_JSON"), (5, "RECORD_TOO_LONG"), (6, "NOT_UTF8"), (7, "")]
    assert [each.number for each in found] == [1, 2, 3, 4, 5]


def test_a_csv_row_that_does_not_fit_its_header_is_named_by_the_line_that_it_begins_on(read: Read) -> None:
    found = read(b'prompt;completion\n"a\nb";c\n\nx;y;z\nu;\n' + b"v;\xff\n")
    assert codes(found) == [(2, ""), (5, "BROKEN_CSV"), (6, "EMPTY_TEXT"), (7, "NOT_UTF8")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'[{"text": "a"}, {"text": ]', [(1, ""), (2, "BROKEN_JSON")]),
        (b'[{"text": "a"}', [(1, ""), (2, "BROKEN_JSON")]),
        (b'[{"text": "a"}, 3, {"text": "\xff"}, {"text": "b"}]', [(1, ""), (2, "NOT_AN_OBJECT"), (3, "NOT_UTF8"), (4, "")]),
        (b"[" * 100_000, [(1, "BROKEN_JSON")]),
        (b'[{"text": "' + b"x" * (MAX_RECORD_BYTES + 9) + b'"}, {"text": "a"}]', [(1, "RECORD_TOO_LONG")]),
    ],
    ids=["broken", "cut off", "others", "deep", "too long"],
)
def test_a_damaged_array_is_read_as_far_as_it_goes(read: Read, data: bytes, expected: list[tuple[int, str]]) -> None:
    assert codes(read(data, DatasetFormat.JSON)) == expected


def test_an_array_is_read_over_the_borders_of_its_pieces(read: Read) -> None:
    rows: list[dict[str, object]] = [{"text": f"{n} " + "é" * (n * 37_000)} for n in range(1, 40)]
    found = read(write_json(rows))
    assert [each.record.text for each in found if isinstance(each.record, Record)] == [row["text"] for row in rows]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_bomb_is_not_unpacked_beyond_its_limit(read: Read, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(b'{"text": "' + b"a" * 1000 + b'"}\n' + b"\n" * (64 << 20))
    assert len(packed) < 200_000
    with pytest.raises(FileInvalid) as refusal:
        read(packed, most=1 << 20)
    assert refusal.value.code == "FILE_TOO_LARGE"


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_packed_file_that_is_cut_off_or_damaged_is_refused(read: Read, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(write_jsonl([{"text": f"{n * 7919} words"} for n in range(2000)]))
    assert len(read(packed + packed)) == 4000  # packed pieces may be joined
    for data in (packed[: len(packed) // 2], packed[:-1], packed + b"\x00rubbish"):
        with pytest.raises(FileInvalid) as refusal:
            read(data)
        assert refusal.value.code == "BROKEN_FILE"


def test_a_damaged_or_misnamed_parquet_file_is_refused(read: Read) -> None:
    data = write_parquet(ROWS)
    for wrong, wanted, code in (
        (data[:-20] + bytes(20), None, "BROKEN_FILE"),
        (b"x", DatasetFormat.PARQUET, "WRONG_FORMAT"),
        (data, DatasetFormat.CSV, "WRONG_FORMAT"),
    ):
        with pytest.raises(FileInvalid) as refusal:
            read(wrong, wanted)
        assert refusal.value.code == code
    with pytest.raises(FileInvalid) as refusal:
        read(data, most=10)
    assert refusal.value.code == "FILE_TOO_LARGE"
