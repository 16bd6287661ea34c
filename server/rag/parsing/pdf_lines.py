"""The text of a PDF page in the order that it is read in, from PDFium's characters and their places, and its paragraphs.

PDFium turns right-to-left lines and resolves presentation forms, but it also turns Latin phrases and the letters of one glyph (لا).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from server.rag.parsing.arabic import (
    ARABIC_LETTER,
    find_left_runs,
    find_right_runs,
    is_reversed,
    join_forms,
    mend_brackets,
    mend_percents,
    remove_controls,
    runs_left_to_right,
    turn_line,
)

_ALEFS = frozenset("اأإآٱ")
_LAM = "ل"
_HYPHENS = "\u00ad\u0002\ufffe"
_NO_HYPHENS = str.maketrans(dict.fromkeys(_HYPHENS))
_UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffd-\uffff]")
_SENTENCE_END = re.compile(r"[.!?؟؛:…][\"'”’»)\]]*$")
_ITEM = re.compile(r"(?:[-–—•●▪◦*·]|\(?\d{1,3}[.)\-]|\(?[A-Za-zا-ي][.)])\s")
# A line this long, compared with the long lines of its page, was broken for want of room and goes on in the next one.
_FULL_LINE = 0.7


@dataclass(frozen=True, slots=True)
class Glyph:
    """A character of a page and where its drawing begins, in points; the letters of one ligature share their place."""

    letter: str
    x: float
    y: float


def read_lines(glyphs: Sequence[Glyph]) -> list[str]:
    """Give the lines of a page with Arabic, each in reading order, its letters plain."""
    lines = list(_split_lines(glyphs))
    turns_ligatures = any(_is_turned_lam_alef(line, *run) for line in lines for run in _find_ligatures(line))
    texts = [_read_line(line, turns_ligatures) for line in lines]
    # Some writers draw Arabic letter by letter from the left; what they show is backwards, and PDFium turned what was right.
    turned = [turn_line(text) for text in texts] if is_reversed("\n".join(texts)) else texts
    return [mend_percents(mend_brackets(text)) for text in turned]


def join_lines(lines: Sequence[str]) -> str:
    """Put the lines of a paragraph on one line each, as far as lengths and marks tell: sentences must not end where lines do."""
    lengths = sorted(len(line) for line in lines)
    full = _FULL_LINE * lengths[int(0.9 * (len(lengths) - 1))] if lengths else 0
    parts: list[str] = []
    goes_on = False
    for line in (one.strip() for one in lines):
        if goes_on and parts and parts[-1][-1] in _HYPHENS:
            parts[-1] = parts[-1][:-1] + line
        elif goes_on and line and not _ITEM.match(line):
            parts[-1] += " " + line
        elif line:
            parts.append(line)
        goes_on = bool(line) and (line[-1] in _HYPHENS or (len(line) >= full and not _SENTENCE_END.search(line)))
    return "\n".join(part.translate(_NO_HYPHENS) for part in parts)


def count_unreadable(text: str) -> int:
    """Count the characters that no reader can make sense of: the font of the page does not say what its glyphs mean."""
    return len(_UNREADABLE.findall(text))


def replace_unreadable(text: str) -> str:
    """Write U+FFFD where a character is none, or one that only its font knows."""
    return _UNREADABLE.sub("\ufffd", text)


def _split_lines(glyphs: Sequence[Glyph]) -> Iterator[list[Glyph]]:
    line: list[Glyph] = []
    for glyph in glyphs:
        if glyph.letter in "\r\n":
            yield line
            line = []
        else:
            line.append(glyph)
    yield line


def _read_line(line: list[Glyph], turns_ligatures: bool) -> str:
    if not any(ARABIC_LETTER.match(glyph.letter) for glyph in line):
        return "".join(glyph.letter for glyph in line)
    for start, end in _find_ligatures(line):
        # Where one is turned all are, except those that PDFium made of a presentation form.
        if turns_ligatures and not (line[start].letter == _LAM and line[start + 1].letter in _ALEFS):
            line[start:end] = line[start:end][::-1]
    text = "".join(glyph.letter for glyph in line)
    if runs_left_to_right(text):
        for start, end in find_right_runs(text):
            line[start:end] = _sort_words(line[start:end])
    else:
        for start, end in find_left_runs(text):
            line[start:end] = sorted(line[start:end], key=lambda glyph: glyph.x)
    return remove_controls(join_forms("".join(glyph.letter for glyph in line)))


def _sort_words(run: Sequence[Glyph]) -> list[Glyph]:
    """Put the words of an Arabic phrase in the order in which they stand, from the right; the blanks between them stay."""
    words = [list(word) for is_blank, word in groupby(run, key=lambda glyph: glyph.letter == " ") if not is_blank]
    blanks = [list(blank) for is_blank, blank in groupby(run, key=lambda glyph: glyph.letter == " ") if is_blank]
    words.sort(key=lambda word: -word[0].x)
    # A phrase begins and ends with a letter: there is one run of blanks less than there are words.
    return [glyph for index, word in enumerate(words) for glyph in (*word, *(blanks[index] if index < len(blanks) else ()))]


def _find_ligatures(line: Sequence[Glyph]) -> Iterator[tuple[int, int]]:
    """Give the runs of two or more Arabic letters that one glyph draws."""
    start = 0
    for end in range(1, len(line) + 1):
        if end < len(line) and (line[end].x, line[end].y) == (line[start].x, line[start].y) and ARABIC_LETTER.match(line[end].letter):
            continue
        if end - start > 1 and ARABIC_LETTER.match(line[start].letter):
            yield start, end
        start = end


def _is_turned_lam_alef(line: Sequence[Glyph], start: int, end: int) -> bool:
    return end - start == 2 and line[start].letter in _ALEFS and line[start + 1].letter == _LAM
