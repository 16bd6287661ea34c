"""The child: what it refuses, each with its cause; what it cannot do; that the parent outlives whatever it meets."""

import io
import os
import socket
import stat
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import docx
import pytest
from fpdf import FPDF

from server.rag.parsing.document import DocumentInvalid, Fault, Heading, Limits, Page
from server.rag.parsing.isolation import parse_document
from tests.rag.parsing.drawn_pdfs import draw_pdf

ROOT = Path(__file__).parents[3]
# Entities of entities: a billion letters from half a kilobyte.
ENTITIES = "<!DOCTYPE x [<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10)) + "]>"


def make_docx() -> bytes:
    document = docx.Document()
    document.add_paragraph("Words.")
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def rewrite(data: bytes, change: Callable[[zipfile.ZipFile], None], replace: dict[str, bytes] | None = None) -> bytes:
    """Give a copy of an archive with parts replaced and others added."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, (replace or {}).get(entry.filename, source.read(entry)))
        change(target)
    return file.getvalue()


def add_link(archive: zipfile.ZipFile) -> None:
    link = zipfile.ZipInfo("word/media/image1.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(link, "/etc/passwd")


def make_encrypted_pdf() -> bytes:
    pdf = FPDF()
    pdf.set_encryption("owner", "user")
    pdf.add_page()
    pdf.set_font("Helvetica")
    pdf.cell(0, 8, "Secret.")
    return bytes(pdf.output())


def make_archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


def bomb(archive: zipfile.ZipFile) -> None:
    archive.writestr("word/media/bomb.bin", b"\0" * (60 << 20))


def with_xml(prefix: str, encoding: str = "utf-8") -> bytes:
    namespace = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    xml = f"<?xml version='1.0' encoding='{encoding}'?>{prefix}<w:document xmlns:w='{namespace}'><w:body/></w:document>"
    return rewrite(make_docx(), lambda _: None, {"word/document.xml": xml.encode(encoding)})


def encrypt_flag(data: bytes) -> bytes:
    """Mark each entry of an archive as encrypted, in the headers and in the directory."""
    changed = bytearray(data)
    for mark, shift in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = changed.find(mark)
        while place >= 0:
            changed[place + shift] |= 1
            place = changed.find(mark, place + 1)
    return bytes(changed)


BAD = {
    "an empty file": (b"", Fault.EMPTY),
    "a blank PDF": (draw_pdf([]), Fault.EMPTY),
    "an encrypted PDF": (make_encrypted_pdf(), Fault.ENCRYPTED),
    "a truncated PDF": (draw_pdf([list("some words")] * 3)[:-200], Fault.TRUNCATED),
    "a PDF without structure": (b"%PDF-1.7\n" + b"junk " * 100 + b"\n%%EOF\n", Fault.DAMAGED),
    "a truncated DOCX": (make_docx()[:-500], Fault.TRUNCATED),
    "a DOCX with a flipped part": (make_docx()[:400] + bytes(200) + make_docx()[600:], Fault.DAMAGED),
    "a DOCX without its text": (rewrite(make_docx(), lambda _: None, {"word/document.xml": b""}), Fault.DAMAGED),
    "an encrypted DOCX": (bytes.fromhex("D0CF11E0A1B11AE1") + bytes(500) + "EncryptedPackage".encode("utf-16-le") * 2, Fault.ENCRYPTED),
    "an old DOC": (bytes.fromhex("D0CF11E0A1B11AE1") + bytes(500), Fault.UNSUPPORTED_FORMAT),
    "encrypted entries": (encrypt_flag(make_docx()), Fault.ENCRYPTED),
    "a ZIP bomb": (rewrite(make_docx(), bomb), Fault.ARCHIVE_BOMB),
    "a link in an archive": (rewrite(make_docx(), add_link), Fault.ARCHIVE_UNSAFE),
    "an entity bomb": (with_xml(ENTITIES), Fault.XML_ENTITIES),
    "an entity bomb in UTF-16": (with_xml(ENTITIES, "utf-16"), Fault.XML_ENTITIES),
    "an external entity": (with_xml("<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>"), Fault.XML_ENTITIES),
    "an entity bomb alone": (f"<?xml version='1.0'?>{ENTITIES}<x>&a9;</x>".encode(), Fault.XML_ENTITIES),
    "an entity bomb in HTML": (f"{ENTITIES.replace('DOCTYPE x', 'DOCTYPE html')}<html>&a9;</html>".encode(), Fault.XML_ENTITIES),
    "a ZIP of something else": (make_archive("a.txt"), Fault.UNSUPPORTED_FORMAT),
    "an empty ZIP": (make_archive(), Fault.UNSUPPORTED_FORMAT),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), Fault.UNSUPPORTED_FORMAT),
    "a program": (Path(sys.executable).read_bytes()[:100_000], Fault.UNSUPPORTED_FORMAT),
    "random bytes": (bytes((n * 7919 + n // 3) % 251 + 1 for n in range(5_000)), Fault.UNKNOWN_ENCODING),
    "a NUL": (b"words \x00 words", Fault.BAD_CHARACTERS),
    "half a pair": (b"words \xed\xa0\x80", Fault.BAD_CHARACTERS),
    "a long word": (b"x" * 100_000, Fault.WORD_TOO_LONG),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_refused_with_its_cause_whatever_its_name(name: str, tmp_path: Path) -> None:
    content, fault = BAD[name]
    path = tmp_path / "document.txt"
    path.write_bytes(content)
    with pytest.raises(DocumentInvalid) as refused:
        parse_document(path)
    assert refused.value.fault is fault
    assert refused.value.message.endswith(".")


def test_a_document_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "document.bin"
    path.write_bytes("عنوان\n=====\n\nنص \U0001f44d.".encode())
    document = parse_document(path)
    assert document.text == "عنوان\n=====\n\nنص \U0001f44d."
    assert document.headings == (Heading(("عنوان",), 0),)
    path.write_bytes(draw_pdf([list("one")], [list("two")]))
    assert parse_document(path).pages == (Page(1, 0, 3), Page(2, 3, 7))


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(300 << 20)
    started = time.monotonic()
    with pytest.raises(DocumentInvalid) as refused:
        parse_document(path)
    assert refused.value.fault is Fault.TOO_LARGE
    assert time.monotonic() - started < 0.1


@pytest.mark.parametrize(
    ("content", "limits", "fault"),
    [
        (draw_pdf(*[[["a"]]] * 11), Limits(pages=10), Fault.TOO_MANY_PAGES),
        (b"word " * 100, Limits(text_characters=100), Fault.TOO_LONG),
        (rewrite(make_docx(), bomb), Limits(archive_ratio=10**6, archive_bytes=50 << 20), Fault.ARCHIVE_BOMB),
        (make_docx(), Limits(archive_entries=3), Fault.ARCHIVE_BOMB),
        (b"# Heading\n\nSome *words* here.\n\n" * 100_000, Limits(seconds=1), Fault.TIMED_OUT),
        (b"<p>" + b"<b>word</b> " * 1_500_000, Limits(memory_bytes=300 << 20), Fault.OUT_OF_MEMORY),
    ],
)
def test_each_limit_ends_the_reading(content: bytes, limits: Limits, fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_bytes(content)
    with pytest.raises(DocumentInvalid) as refused:
        parse_document(path, limits)
    assert refused.value.fault is fault


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(DocumentInvalid):
        parse_document(fifo)
    with pytest.raises(FileNotFoundError):
        parse_document(tmp_path / "nothing")


def test_a_confined_process_has_no_network_no_programs_and_writes_no_files(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        script = f"""
            import ctypes, os, socket, subprocess
            from server.rag.parsing.sandbox import confine
            confine(1 << 30, 10)
            def attempt(work):
                try:
                    work()
                    print("done")
                except OSError as error:
                    print(type(error).__name__, error.errno)
            attempt(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1))
            attempt(lambda: os.execv("/bin/true", ["true"]))
            attempt(lambda: open({str(tmp_path / "file")!r}, "w").write("x" * 100_000))
            attempt(lambda: open("/dev/null").close())
        """
        result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:4] == ["PermissionError 13", "PermissionError 13", "OSError 27", "done"]


def test_a_child_that_dies_takes_nothing_along(tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_bytes(b"words")
    with pytest.raises(DocumentInvalid):
        # Less than Python itself has: whatever the child does next ends it.
        parse_document(path, Limits(memory_bytes=8 << 20))
    assert parse_document(path).text == "words"
