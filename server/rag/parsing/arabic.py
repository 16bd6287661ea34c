"""Arabic text as PDFs hold it: presentation forms to letters, controls out, reversed lines found and turned. Knows no format."""

import re
import unicodedata
from collections.abc import Iterator

_LETTERS = "\u0621-\u063a\u0641-\u064a\u066e-\u06d3\u06fa-\u06ff"
ARABIC_LETTER = re.compile(rf"[{_LETTERS}\ufb50-\ufdff\ufe70-\ufefc]")
_STRONG_LEFT = re.compile(r"[A-Za-z\u00c0-\u024f\u0370-\u052f]")
# Bidi controls, zero-width space, word joiner and byte order mark. Joiners stay: Persian spelling and emoji need them.
_CONTROLS = re.compile(r"[\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_FORMS = "\ufb00-\ufb06\ufb50-\ufdff\ufe70-\ufefc"
_HAS_FORMS = re.compile(f"[{_FORMS}]")
# Signs that stand for a phrase and are written as one character in plain text, too.
_KEPT_SIGNS = frozenset("\ufdfa\ufdfb\ufdfc\ufdfd")
_MARKS = re.compile(r"[\u064b-\u065f\u0670\u0640]")
_WHOLE_WORD = re.compile(r"[\u0621-\u063a\u0641-\u064a]{3,}")
_LEAST_SIGNS = 2
_MIRRORED = str.maketrans("()[]{}<>«»", ")(][}{><»«")
# What may be read from left to right inside Arabic: from a Latin letter or digit to the last one before the next Arabic letter.
_LEFT_WORD = r"A-Za-z\d\u00c0-\u024f"
_LEFT_RUN = re.compile(rf"[\-_/&@+.#]?[{_LEFT_WORD}](?:[^{_LETTERS}\n]*[{_LEFT_WORD}])?[+#]*")
_NUMBER = re.compile(r"\d+(?:[.,/:\-\u066b\u066c]\d+)*")
_DRAWN_PERCENT = re.compile(r"(?<![\d%])([%٪])(\d+(?:[.,\u066b]\d+)*)(?![\d%٪])")
_RIGHT_RUN = re.compile(rf"[{_LETTERS}](?:[^A-Za-z\d\n]*[{_LETTERS}])?")


def _make_letters() -> dict[int, str]:
    """Map each presentation form to its letters; lone vowel signs lose the blank or tatweel that carries them in NFKC."""
    table = {}
    for code in (*range(0xFB00, 0xFB07), *range(0xFB50, 0xFE00), *range(0xFE70, 0xFEFD)):
        letters = unicodedata.normalize("NFKC", chr(code))
        if letters != chr(code) and chr(code) not in _KEPT_SIGNS:
            table[code] = letters.lstrip(" \u0640") or letters
    return table


_FORM_LETTERS = _make_letters()
_NOT_PLAIN = re.compile(rf"[{_FORMS}{_CONTROLS.pattern[1:-1]}]")


def join_forms(text: str) -> str:
    """Replace presentation forms (ﻣﺪﺭﺳﺔ, ﻻ, ﬁ) by the letters that they show; everything else stays, unlike in full NFKC."""
    return text.translate(_FORM_LETTERS) if _HAS_FORMS.search(text) else text


def remove_controls(text: str) -> str:
    """Take out bidi controls and zero-width characters."""
    return _CONTROLS.sub("", text)


def is_plain(text: str) -> bool:
    """Say whether a text has neither presentation forms nor controls."""
    return _NOT_PLAIN.search(text) is None


def is_reversed(text: str) -> bool:
    """Say whether Arabic words stand backwards in a text: in visual order, as drawn, not as read.

    ة and ى never begin words, and the article ال begins many; what points backwards must be much more than what does not.
    """
    forwards = impossible = unlikely = 0
    for word in _WHOLE_WORD.findall(_MARKS.sub("", join_forms(text))):
        forwards += word.startswith("ال") + (word[-1] in "ةى")
        impossible += word[0] in "ةى"
        unlikely += word.endswith("لا")
    return impossible > 0 and impossible + unlikely >= _LEAST_SIGNS and impossible + unlikely > 2 * forwards


def turn_line(line: str) -> str:
    """Give a line of visual order in the order that it is read in, or the other way round; one without Arabic stays.

    Latin phrases and numbers keep their order inside Arabic; in a line that is mostly Latin only the Arabic words turn.
    """
    if not ARABIC_LETTER.search(line):
        return line
    if runs_left_to_right(line):
        return _RIGHT_RUN.sub(lambda run: _turn(run[0]), line)
    turned: list[str] = []
    place = 0
    for start, end in find_left_runs(line):
        turned += [_turn(line[place:start]), line[start:end]]
        place = end
    return "".join(reversed([*turned, _turn(line[place:])]))


def runs_left_to_right(line: str) -> bool:
    """Say whether a line has more Latin letters than Arabic ones."""
    return len(_STRONG_LEFT.findall(line)) > len(ARABIC_LETTER.findall(line))


def find_right_runs(line: str) -> Iterator[tuple[int, int]]:
    """Give the spans of the Arabic phrases of a line that runs from left to right."""
    return (run.span() for run in _RIGHT_RUN.finditer(line))


def find_left_runs(line: str) -> Iterator[tuple[int, int]]:
    """Give the spans that keep their order inside Arabic: phrases with a Latin letter whole, else each number."""
    for run in _LEFT_RUN.finditer(line):
        if _STRONG_LEFT.search(run[0]):
            yield run.span()
        else:
            yield from (number.span() for number in _NUMBER.finditer(line, run.start(), run.end()))


def _turn(text: str) -> str:
    return text[::-1].translate(_MIRRORED)


def mend_brackets(line: str) -> str:
    """Mirror the brackets of a line with Arabic where that pairs more of them: some writers store the drawn one, some the read one."""
    if not ARABIC_LETTER.search(line):
        return line
    mirrored = line.translate(_MIRRORED)
    return mirrored if _count_unpaired(mirrored) < _count_unpaired(line) else line


def mend_percents(line: str) -> str:
    """Put percent signs behind their numbers in a line with Arabic: they are drawn before them."""
    return _DRAWN_PERCENT.sub(r"\2\1", line) if ARABIC_LETTER.search(line) else line


def _count_unpaired(line: str) -> int:
    unpaired = 0
    for opening, closing in ("()", "[]", "{}", "«»"):
        depth = 0
        for letter in line:
            if letter == opening:
                depth += 1
            elif letter == closing and depth:
                depth -= 1
            elif letter == closing:
                unpaired += 1
        unpaired += depth
    return unpaired
