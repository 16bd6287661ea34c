"""What an embedding family does to a text before its tokens are taken, with the way back to the original's characters.

In all of them presentation forms are read as letters, and bidi controls and zero-width characters not at all: no model learned them.
"""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from server.domain.catalogue import Preparation
from server.rag.parsing.arabic import is_plain, join_forms, remove_controls

_DIACRITICS_AND_TATWEEL = frozenset("\u0640\u0670" + "".join(map(chr, range(0x064B, 0x0653))))
_ARABIC_DIGITS = {ord("٠") + digit: str(digit) for digit in range(10)} | {ord("۰") + digit: str(digit) for digit in range(10)}
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Half a surrogate pair is no character and no tokenizer takes it.
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class PreparedText:
    """A text as the model reads it; `origins[i]` is the place in the original of its character `i`, None where nothing moved."""

    text: str
    origins: Sequence[int] | None = None

    def find_origin(self, place: int) -> int:
        """Give the place in the original text of a character of the prepared one."""
        return place if self.origins is None else self.origins[place]


def prepare_text(text: str, preparation: Preparation) -> PreparedText:
    """Prepare a text as its embedding family was trained to read it; lone surrogates become U+FFFD in all of them."""
    text = _LONE_SURROGATE.sub("\ufffd", text)
    letters: Iterator[tuple[str, int]] = ((letter, place) for place, letter in enumerate(text))
    if not is_plain(text):
        letters = _make_plain(letters)
    if preparation is Preparation.UNDIACRITIZED:
        return _join(pair for pair in letters if pair[0] not in _DIACRITICS_AND_TATWEEL)
    if preparation is Preparation.ARABERT_V02:
        return _join(_space_out(_resolve_entities(_join(letters))))
    return PreparedText(text) if is_plain(text) else _join(letters)


def _make_plain(letters: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    return ((shown, place) for letter, place in letters for shown in join_forms(remove_controls(letter)))


def _join(letters: Iterator[tuple[str, int]]) -> PreparedText:
    pairs = list(letters)
    return PreparedText("".join(letter for letter, _ in pairs), [place for _, place in pairs])


def _resolve_entities(text: PreparedText) -> Iterator[tuple[str, int]]:
    """Give the characters with their places in the original, HTML entities resolved."""
    place = 0
    for match in _ENTITY.finditer(text.text):
        yield from ((text.text[index], text.find_origin(index)) for index in range(place, match.start()))
        yield from ((letter, text.find_origin(match.start())) for letter in _LONE_SURROGATE.sub("\ufffd", html.unescape(match[0])))
        place = match.end()
    yield from ((text.text[index], text.find_origin(index)) for index in range(place, len(text.text)))


def _space_out(letters: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Drop diacritics and tatweel, write digits in ASCII, and put spaces around punctuation and between digits and letters."""
    before = " "
    for letter, place in letters:
        if letter in _DIACRITICS_AND_TATWEEL:
            continue
        shown = _ARABIC_DIGITS.get(ord(letter), letter)
        touch = not before.isspace() and not shown.isspace()
        if touch and (_kind(shown) == "mark" or _kind(before) != _kind(shown)):
            yield " ", place
        yield shown, place
        before = shown


def _kind(letter: str) -> str:
    if letter.isdigit():
        return "digit"
    # Brackets stay with what they hold: AraBERT's own preparation writes words such as [رابط] in them.
    return "letter" if letter.isalpha() or letter in "[]" else "mark"
