"""What is checked of a DOCX or PPTX before its parser sees it: a ZIP that is no bomb, holds no link, and XML without entities."""

import io
import lzma
import stat
import zipfile
import zlib
from xml.parsers import expat

from server.rag.parsing.document import DocumentInvalid, Fault, Limits

# Small archives may be packed as tightly as they like.
_RATIO_ASKED_FROM = 32 << 20
_READ_BYTES = 1 << 16
_ENCRYPTED_FLAG = 1
_XML_ENDINGS = (".xml", ".rels", ".vml")


class _RootReached(Exception):
    """The document type would have come before this."""


def open_archive(data: bytes) -> zipfile.ZipFile:
    """Open a ZIP held in memory. Raises DocumentInvalid when it is cut off or damaged."""
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        # The directory stands at the end: what was cut off has none.
        raise DocumentInvalid(Fault.TRUNCATED, "The file is a ZIP archive without its end: it was cut off or damaged.") from error


def check_archive(archive: zipfile.ZipFile, limits: Limits) -> None:
    """Check each entry and the sum of them. Raises DocumentInvalid: bomb, link, encrypted, entities, damaged.

    The sizes that the directory states are enough: reading stops there, whatever an entry holds.
    """
    refuse_encryption(archive)
    entries = archive.infolist()
    if len(entries) > limits.archive_entries:
        raise DocumentInvalid(Fault.ARCHIVE_BOMB, f"The file has {len(entries):,} parts; {limits.archive_entries:,} are read at most.")
    unpacked = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_size for entry in entries)
    if unpacked > limits.archive_bytes:
        raise DocumentInvalid(Fault.ARCHIVE_BOMB, f"The file unpacks to {unpacked:,} bytes; {limits.archive_bytes:,} are read at most.")
    if unpacked > _RATIO_ASKED_FROM and unpacked > limits.archive_ratio * max(packed, 1):
        raise DocumentInvalid(Fault.ARCHIVE_BOMB, f"The file unpacks to more than {limits.archive_ratio} times its size, as bombs do.")
    for entry in entries:
        _check_entry(archive, entry)


def refuse_encryption(archive: zipfile.ZipFile) -> None:
    """Raise DocumentInvalid where an entry is encrypted."""
    if any(entry.flag_bits & _ENCRYPTED_FLAG for entry in archive.infolist()):
        raise DocumentInvalid(Fault.ENCRYPTED, "The file is encrypted: save it without its password.")


def _check_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise DocumentInvalid(Fault.ARCHIVE_UNSAFE, "The file has a symbolic link in it, which no document needs.")
    if entry.filename.lower().endswith(_XML_ENDINGS):
        try:
            _check_xml(archive, entry)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError, ValueError) as error:
            raise DocumentInvalid(Fault.DAMAGED, f"A part of the file is damaged: {entry.filename}.") from error


def _check_xml(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Read as far as the root element: a document type before it declares entities, which no office document has."""
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse_document_type
    parser.StartElementHandler = _stop
    try:
        with archive.open(entry) as content:
            while piece := content.read(_READ_BYTES):
                parser.Parse(piece, False)
    except _RootReached:
        return
    except expat.ExpatError as error:
        raise DocumentInvalid(Fault.DAMAGED, "A part of the file is damaged: it is no XML.") from error


def _refuse_document_type(*_: object) -> None:
    raise DocumentInvalid(Fault.XML_ENTITIES, "The file declares XML entities, as bombs do and office documents never.")


def _stop(*_: object) -> None:
    raise _RootReached
