"""Which format a file has, by its content alone: names and endings lie."""

import csv
import io
import json
import re
import zipfile
import zlib

from server.domain.documents import DocumentFormat
from server.rag.parsing.archives import open_archive, refuse_encryption
from server.rag.parsing.document import DocumentInvalid, Fault

SUPPORTED = "PDF, DOCX, PPTX, HTML, Markdown, plain text, CSV and JSONL"
_PDF_MARK = b"%PDF-"
_PDF_END = b"%%EOF"
_PDF_MARK_WITHIN = 1024  # what PDF readers allow before the mark, and behind the end
_OLE_MARK = bytes.fromhex("D0CF11E0A1B11AE1")
_CONTENT_TYPES = "[Content_Types].xml"
_CONTENT_TYPES_BYTES = 4 << 20
_OFFICE_KINDS = (
    (b"wordprocessingml.document.main+xml", DocumentFormat.DOCX),
    (b"wordprocessingml.template.main+xml", DocumentFormat.DOCX),
    (b"ms-word.document.macroEnabled.main+xml", DocumentFormat.DOCX),
    (b"presentationml.presentation.main+xml", DocumentFormat.PPTX),
    (b"presentationml.slideshow.main+xml", DocumentFormat.PPTX),
    (b"ms-powerpoint.presentation.macroEnabled.main+xml", DocumentFormat.PPTX),
)
# Formats that someone may take for a document; what is not here and no text either is refused without a name.
_FOREIGN_MARKS = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"\x7fELF", "a program"),
    (b"MZ\x90", "a program"),
    (b"PAR1", "a Parquet file"),
    (b"SQLite format 3", "a database"),
    (b"{\\rtf", "an RTF document"),
    (b"%!PS", "a PostScript document"),
)

_SAMPLE_CHARACTERS = 1 << 16
_HTML_START = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--(?:(?!-->).){0,4000}-->\s*)*(?:<!doctype\s+html|<(?:html|head|body|title|meta|link|script|style|div|p|span|h[1-6]|table|ul|ol"
    r"|article|section|main|header|nav|form|center|font|blockquote|pre)\b[^<>]*>)",
    re.IGNORECASE | re.DOTALL,
)
_XML_START = re.compile(r"\s*<(?:\?xml|!DOCTYPE|!ENTITY)", re.IGNORECASE)
_ENTITY = re.compile(r"<!ENTITY", re.IGNORECASE)
_MARKDOWN_SIGNS = re.compile(
    r"(?:\A|\n\n|\A---\n(?:.*\n){1,40}?---\n\n?)#{1,6} \S"  # a heading behind an empty line, or behind front matter
    r"|^[^\n]{1,200}\n(?:={3,}|-{3,})[ \t]*$(?=\n\n)"  # an underlined heading
    r"|^(?:```|~~~)[\w+-]*[ \t]*$"
    r"|^\|?(?:[ \t]*:?-{3,}:?[ \t]*\|)+(?:[ \t]*:?-{3,}:?)?[ \t]*$"  # the second row of a table
    r"|!?\[[^\]\n]{1,300}\]\((?:https?://|/|\.|#|mailto:|data:)[^)\n]*\)",
    re.MULTILINE,
)
DELIMITERS = ",;\t|"
_LEAST_ROWS = 2
_LEAST_EVEN_ROWS = 0.9
_MOST_SPACED_CELLS = 0.5


def find_binary_format(data: bytes) -> DocumentFormat | None:
    """Tell PDF, DOCX and PPTX by their marks; None where the content may be text. Raises DocumentInvalid for other formats."""
    if data.startswith(_PDF_MARK) or (_PDF_MARK in data[:_PDF_MARK_WITHIN] and _PDF_END in data[-_PDF_MARK_WITHIN:]):
        return DocumentFormat.PDF
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _find_office_format(data)
    if data.startswith(_OLE_MARK):
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise DocumentInvalid(Fault.ENCRYPTED, "The document is encrypted: save it without its password.")
        raise _refuse("a document of Office 97 to 2003: save it as DOCX or PPTX")
    for mark, name in _FOREIGN_MARKS:
        if data.startswith(mark):
            raise _refuse(name)
    return None


def _find_office_format(data: bytes) -> DocumentFormat:
    archive = open_archive(data)
    refuse_encryption(archive)
    try:
        with archive.open(_CONTENT_TYPES) as content:
            types = content.read(_CONTENT_TYPES_BYTES)
    except KeyError:
        raise _refuse("a ZIP archive") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DocumentInvalid(Fault.DAMAGED, "The file is a damaged ZIP archive.") from error
    for kind, found in _OFFICE_KINDS:
        if kind in types:
            return found
    raise _refuse("an office document of another kind")


def _refuse(name: str) -> DocumentInvalid:
    return DocumentInvalid(Fault.UNSUPPORTED_FORMAT, f"The file is {name}; what is read is {SUPPORTED}.")


def find_text_format(text: str) -> DocumentFormat:
    """Tell the formats of text apart; what looks like none of them is plain. Raises DocumentInvalid for XML that is no HTML."""
    sample = text[:_SAMPLE_CHARACTERS]
    if _XML_START.match(sample) and _ENTITY.search(sample):
        raise DocumentInvalid(Fault.XML_ENTITIES, "The file declares XML entities, as bombs do.")
    if _HTML_START.match(sample):
        return DocumentFormat.HTML
    if _XML_START.match(sample):
        raise _refuse("XML")
    if _is_jsonl(sample, len(text) > len(sample)):
        return DocumentFormat.JSONL
    if _MARKDOWN_SIGNS.search(sample):
        return DocumentFormat.MARKDOWN
    return DocumentFormat.CSV if find_delimiter(text) else DocumentFormat.PLAIN_TEXT


def _is_jsonl(sample: str, is_cut: bool) -> bool:
    """Say whether the first line is a JSON object; the others are then records too, or mistakes."""
    lines = sample.lstrip().split("\n", 1)
    if not lines[0].startswith("{"):
        return False
    if len(lines) == 1 and is_cut:
        return lines[0].startswith('{"')
    try:
        return isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def find_delimiter(text: str) -> str:
    """Give the delimiter that makes an even table of a text, empty where none does: prose has commas too, with a space behind."""
    sample = text[:_SAMPLE_CHARACTERS]
    if len(text) > len(sample):
        sample = sample[: sample.rfind("\n") + 1]
    best, delimiter = max((_count_even_columns(sample, one), one) for one in DELIMITERS)
    return delimiter if best else ""


def _count_even_columns(sample: str, delimiter: str) -> int:
    """Give the columns that nearly all rows have; 0 where rows differ, or where there is one only."""
    try:
        rows = [row for row in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter) if row]
    except csv.Error:
        return 0
    if len(rows) < _LEAST_ROWS:
        return 0
    columns = len(rows[0])
    even = [row for row in rows if len(row) == columns]
    cells = [cell for row in even for cell in row[1:]]
    spaced = sum(cell.startswith(" ") for cell in cells)
    is_table = columns > 1 and len(even) >= _LEAST_EVEN_ROWS * len(rows) and spaced <= _MOST_SPACED_CELLS * len(cells)
    return columns if is_table else 0
