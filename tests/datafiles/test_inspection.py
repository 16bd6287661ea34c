"""Inspections: what is counted and sampled, and that a hostile file harms only the process that reads it."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from server.datafiles.inspection import MAX_SAMPLED_OF_A_CODE, inspect
from server.datafiles.inspector import InspectionProcesses
from server.domain.datasets import Compression, DatasetFormat, Inspection, InspectionOrder, InspectionProgress, RecordKind
from server.domain.findings import Severity

MAX_BYTES = 64 << 20


def look(path: Path, rows: Sequence[object], kind: RecordKind | None = None) -> Inspection:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return inspect(InspectionOrder(str(path), MAX_BYTES, record_kind=kind), lambda _: None)


async def look_in_process(path: Path, inspector: InspectionProcesses | None = None) -> list[InspectionProgress | Inspection]:
    order = InspectionOrder(str(path), MAX_BYTES)
    return [message async for message in (inspector or InspectionProcesses()).inspect(order)]


def test_each_code_is_counted_and_its_first_findings_kept(tmp_path: Path) -> None:
    rows = [{"text": "The same river."}] * 30 + [
        {"text": "a"},
        {"text": "lost \ufffd letter"},
        {"text": "word " * 30_000},
        "{\n",
        {"prompt": 1},
    ]
    found = look(tmp_path / "x", rows)
    assert (found.record_count, found.invalid_record_count, found.record_kind) == (33, 2, RecordKind.TEXT)
    counts = {finding.code: (finding.count, finding.line, finding.severity) for finding in found.finding_counts}
    assert counts == {
        "DUPLICATE": (29, 2, Severity.WARNING),
        "VERY_SHORT": (1, 31, Severity.WARNING),
        "UNDECODED_TEXT": (1, 32, Severity.WARNING),
        "VERY_LONG": (1, 33, Severity.WARNING),
        "BROKEN_JSON": (1, 34, Severity.ERROR),
        "MISSING_FIELD": (1, 35, Severity.ERROR),
    }
    assert sum(finding.code == "DUPLICATE" for finding in found.findings) == MAX_SAMPLED_OF_A_CODE
    assert [finding.line for finding in found.findings[-2:]] == [34, 35]


def test_records_of_several_kinds_are_told_of_unless_one_was_named(tmp_path: Path) -> None:
    rows = [{"text": "The river."}, {"text": "The town.", "instruction": "q", "output": "answer"}]
    mixed = look(tmp_path / "x", rows)
    assert mixed.record_kind is RecordKind.MIXED
    assert [(finding.code, finding.line) for finding in mixed.finding_counts] == [("MIXED_KINDS", None)]
    named = look(tmp_path / "x", rows, RecordKind.TEXT)
    assert (named.record_kind, named.finding_counts) == (RecordKind.TEXT, ())


def test_records_with_equal_words_in_other_places_are_not_duplicates(tmp_path: Path) -> None:
    rows = [{"prompt": "ab cd", "completion": "ef"}, {"prompt": "ab", "completion": "cdef"}, {"text": "ab cdef"}]
    assert "DUPLICATE" not in {finding.code for finding in look(tmp_path / "x", rows).findings}


async def test_many_records_are_looked_through_with_progress_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(
            f'{{"prompt": "Question {number}", "completion": "Answer {number * 7} of the keeper"}}\n' for number in range(100_000)
        )
    largest = 0
    seen: list[int] = []
    async with aclosing(InspectionProcesses().inspect(InspectionOrder(str(path), MAX_BYTES))) as messages:
        async for message in messages:
            children = psutil.Process().children()
            largest = max([largest, *(child.memory_info().rss for child in children if "inspect" in child.cmdline())])
            if isinstance(message, Inspection):
                assert (message.record_count, message.compression, message.format) == (100_000, Compression.GZIP, DatasetFormat.JSONL)
            else:
                seen.append(message.records)
    assert seen
    assert seen == sorted(seen)
    assert 0 < largest < 200 << 20


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import resource, sys; from server.datafiles import inspection as i; i.MAX_MEMORY_BYTES = 256 << 20\n"
         "i.inspect = lambda order, report: bytearray(1 << 30); sys.exit(i.run_inspection())", "FILE_NOT_READABLE"),
        ("import sys; from server.datafiles import inspection as i; i.BASE_CPU_SECONDS, i.BYTES_PER_CPU_SECOND = 1, 1 << 40\n"
         "def spin(order, report):\n while True: pass\ni.inspect = spin; sys.exit(i.run_inspection())", "FILE_NOT_READABLE"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "FILE_NOT_READABLE"),
    ],
    ids=["memory", "time", "crash"],
)  # fmt: skip
async def test_a_file_that_breaks_its_reader_is_refused_and_nothing_else_happens(tmp_path: Path, program: str, code: str) -> None:
    path = tmp_path / "x"
    path.write_text('{"text": "a"}\n')
    (message,) = await look_in_process(path, InspectionProcesses(command=(sys.executable, "-c", program)))
    assert isinstance(message, Inspection)
    assert (message.error_code, message.record_count) == (code, 0)


async def test_a_reader_cannot_write_to_the_disk_and_sees_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, sys; from server.datafiles import inspection as i\n"
        "def look(order, report):\n"
        " assert 'AWS_SECRET_ACCESS_KEY' not in os.environ\n"
        " with open(order.path + '.new', 'wb') as file: file.write(b'x')\n"
        "i.inspect = look; sys.exit(i.run_inspection())"
    )
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(RuntimeError, match="File too large"):
        await look_in_process(tmp_path / "x", InspectionProcesses(command=(sys.executable, "-c", program)))
    assert not (tmp_path / "x.new").exists() or os.path.getsize(tmp_path / "x.new") == 0


async def test_a_reader_whose_result_nobody_wants_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('{"text": "The river of the town"}\n' * 300_000)
    async with aclosing(InspectionProcesses().inspect(InspectionOrder(str(path), MAX_BYTES))) as messages:
        assert isinstance(await anext(messages), InspectionProgress)
        (child,) = [child for child in psutil.Process().children() if "inspect" in child.cmdline()]
    assert not child.is_running()


async def test_a_packed_bomb_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b'{"text": "a b c d"}\n' + b" " * (MAX_BYTES + 1)))
    *_, message = await look_in_process(path)
    assert isinstance(message, Inspection)
    assert message.error_code == "FILE_TOO_LARGE"


def test_inspections_load_no_torch() -> None:

    program = (
        "import sys, server.datafiles.inspection, server.datafiles.inspector; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
