"""Bytes to text: Unicode where it is, the Arabic and Western code pages of Windows where the letters speak for them."""

import codecs
import re

from server.rag.parsing.document import DocumentInvalid, Fault, ParseWarning

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE_BYTES = 1 << 16
_BELOW_8 = bytes(range(8))
_MOST_OTHERS = 0.1
_DECLARED = re.compile(rb"<(?:meta[^>]{0,200}charset|\?xml[^>]{0,100}encoding)\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{2,40})", re.IGNORECASE)
_ARABIC_CODE_PAGES = ("cp1256", "iso8859_6")
_WORD = re.compile(r"[^\W\d_]{2,}")
_ARABIC_WORD = re.compile(r"[\u0621-\u064a\u0679\u067e\u0686\u0688\u0691\u0698\u06a9\u06af\u06ba\u06be]+")
# Nearly every Arabic or Persian sentence has one of these; a code page read as the wrong one has them by chance only.
_COMMON = "في من على إلى عن أن إن هذا هذه التي الذي كان قال بين بعد مع لا ما أو ثم هو هي و را به از که این است با"
_COMMON_WORDS = frozenset(_COMMON.split())
_LEAST_ARABIC = 0.8  # of the words with a letter beyond ASCII
_LEAST_COMMON = 0.08  # of those, the ones that begin with the article or are common
_MOST_WESTERN = 0.25  # letters beyond ASCII that a Western text may have
_WESTERN_LETTERS = re.compile(r"[\u00c0-\u024f]")


def decode_text(data: bytes) -> tuple[str, tuple[ParseWarning, ...]]:
    """Decode a text file, with a warning where its encoding had to be guessed; line ends become newlines.

    Raises DocumentInvalid where it is no text, or one that no known encoding explains.
    """
    text, warnings = _decode(data)
    if "\x00" in text:
        raise DocumentInvalid(Fault.BAD_CHARACTERS, "The file has NUL characters: it is damaged, or it is no text.")
    return text.replace("\r\n", "\n").replace("\r", "\n"), warnings


def _decode(data: bytes) -> tuple[str, tuple[ParseWarning, ...]]:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _decode_strictly(data[len(mark) :], encoding), ()
    encoding = _find_utf16(data)
    if encoding:
        return _decode_strictly(data, encoding), ()
    try:
        return data.decode("utf-8"), ()
    except UnicodeDecodeError as error:
        if _is_surrogate(data, error):
            raise DocumentInvalid(Fault.BAD_CHARACTERS, "The file has halves of surrogate pairs, which are no characters.") from error
    encoding = _find_declared(data) or _guess(data)
    if not encoding:
        raise DocumentInvalid(Fault.UNKNOWN_ENCODING, "The file's text encoding cannot be told: save it as UTF-8.")
    message = f"The file is not UTF-8; it was read as {encoding}. Save it as UTF-8 if letters are wrong."
    return data.decode(encoding), (ParseWarning("ENCODING_GUESSED", message),)


def _decode_strictly(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if "surrogate" in error.reason:
            message = "The file has halves of surrogate pairs, which are no characters."
            raise DocumentInvalid(Fault.BAD_CHARACTERS, message) from error
        raise DocumentInvalid(Fault.TRUNCATED, f"The file says that it is {encoding}, and is cut off or damaged.") from error


def _is_surrogate(data: bytes, error: UnicodeDecodeError) -> bool:
    """Say whether strict UTF-8 stopped at an encoded half of a pair: three bytes, ED A0 80 to ED BF BF."""
    piece = data[error.start : error.start + 3]
    return len(piece) == 3 and piece[0] == 0xED and 0xA0 <= piece[1] <= 0xBF and 0x80 <= piece[2] <= 0xBF


def _find_utf16(data: bytes) -> str:
    """Find UTF-16 without its mark: of Latin, Greek, Cyrillic, Hebrew and Arabic every second byte is below 8, which no other text has."""
    sample = data[:_SAMPLE_BYTES]
    if not sample or len(data) % 2:
        return ""
    first, second = (len(half.translate(None, _BELOW_8)) / len(half) for half in (sample[0::2], sample[1::2]))
    if first >= 1 - _MOST_OTHERS and second <= _MOST_OTHERS:
        return "utf-16-le"
    return "utf-16-be" if second >= 1 - _MOST_OTHERS and first <= _MOST_OTHERS else ""


def _find_declared(data: bytes) -> str:
    """Find the encoding that HTML or XML declares, where it is one of text that the bytes are valid in."""
    match = _DECLARED.search(data[:4096])
    if match is None:
        return ""
    try:
        info = codecs.lookup(match[1].decode("ascii"))
        data.decode(info.name)
    except (LookupError, UnicodeDecodeError):
        return ""
    return info.name


def _guess(data: bytes) -> str:
    best, encoding = max((_score_arabic(data, name), name) for name in _ARABIC_CODE_PAGES)
    if best > 0:
        return encoding
    return "cp1252" if _is_western(data) else ""


def _score_arabic(data: bytes, encoding: str) -> float:
    """Give the share of common words, 0 where the text is not Arabic in this encoding."""
    try:
        text = data[:_SAMPLE_BYTES].decode(encoding)
    except UnicodeDecodeError:
        return 0.0
    words = [word for word in _WORD.findall(text) if not word.isascii()]
    arabic = [word for word in words if _ARABIC_WORD.fullmatch(word)]
    if not arabic or len(arabic) < _LEAST_ARABIC * len(words):
        return 0.0
    known = sum(word in _COMMON_WORDS or (len(word) > 3 and word.startswith("ال")) for word in arabic)
    share = known / len(arabic)
    return share if share >= _LEAST_COMMON else 0.0


def _is_western(data: bytes) -> bool:
    """Say whether most letters are ASCII and the others, read as Windows-1252, are accented letters."""
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    letters = sum(letter.isalpha() for letter in text)
    accented = len(_WESTERN_LETTERS.findall(text))
    controls = sum(letter < " " and letter not in "\t\n\r\f" for letter in text)
    return controls == 0 and 0 < accented <= _MOST_WESTERN * letters
