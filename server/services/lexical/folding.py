"""Folds what is written in many ways into one, and cuts it into words, for matching only: nothing is cited from a folded text."""

import unicodedata

import regex

# A longer one is no word: it is cut here.
MAX_WORD_CHARACTERS = 64

# Zero-width characters, bidi controls, soft hyphens: they are seen by nobody and part words.
_INVISIBLE = regex.compile(r"[\p{Cf}\N{COMBINING GRAPHEME JOINER}]+")
# Accents of European letters, Hebrew points, Arabic diacritics (also the hamza and madda that NFKD takes off alef, waw and ya), tatweel.
# Marks of other scripts stay: in Indic ones they are vowels.
_MARKS = regex.compile(r"[\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed\u08ca-\u08ff]+")
_DIGIT = regex.compile(r"(?V1)[\p{Nd}--[0-9]]")
# The last line: letters that Arabic borrows for sounds of other languages, and as often writes with its own.
_LETTERS = str.maketrans(
    {
        "ٱ": "ا", "ى": "ي", "ی": "ي", "ې": "ي", "ے": "ي", "ة": "ه", "ۀ": "ه", "ہ": "ه", "ھ": "ه", "ە": "ه", "ک": "ك", "ڪ": "ك",
        "گ": "ك", "پ": "ب", "چ": "ج", "ڤ": "ف", "ڥ": "ف",
    }
)  # fmt: skip
# Arabic letters, scripts that put no spaces between words, and everything else that words are made of.
_WORD = regex.compile(
    r"(?V1)(?P<arabic>[\p{Arabic}&&[\p{L}\p{M}]]+)"
    r"|(?P<unspaced>[[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&[\p{L}\p{M}]]+)"
    r"|(?P<other>[[\p{L}\p{M}\p{N}]--[\p{Arabic}\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+)"
)


def fold(text: str) -> str:
    """Write letters that differ in form, case or diacritics alike: presentation forms, أإآٱ/ا, ى/ي, ة/ه, é/e, digits of any script."""
    shown = _INVISIBLE.sub("", unicodedata.normalize("NFKD", text))
    # Casefold can compose and decompose: marks after it. NFC joins Hangul again.
    plain = unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFKD", shown.casefold())))
    return _DIGIT.sub(_read_digit, plain.translate(_LETTERS))


def split_words(text: str) -> list[str]:
    """Give the folded words of a text in order, each of one script and at most 64 characters.

    Scripts without spaces give each two neighbouring characters.
    """
    words: list[str] = []
    for match in _WORD.finditer(fold(text)):
        if match.lastgroup == "unspaced":
            run = match.group()
            words += [run[place : place + 2] for place in range(max(1, len(run) - 1))]
        else:
            words.append(match.group()[:MAX_WORD_CHARACTERS])
    return words


def _read_digit(match: regex.Match[str]) -> str:
    return str(unicodedata.decimal(match.group()))
