"""Where sentences end and which words they hold, in Arabic and English, without a model. Knows nothing of documents."""

import re
import unicodedata
from collections.abc import Iterator

_CLOSERS = "\"'”’»)\\]}"
# A full stop ends a sentence before a space only (3.14, a.b), and not after an initial or a title (J. Smith, i.e., د. سعاد).
# The lookbehind and the possessive quantifiers keep the search linear over runs such as "......".
_END = re.compile(
    rf"(?<![.!?…])(?<![\s.]\w)(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bSt)(?<!\bProf)[.!?…]++[{_CLOSERS}]*+(?=\s|\Z)"
    rf"|(?<![؟؛۔。！？])[؟؛۔。！？]++[.!?…]*+[{_CLOSERS}]*+"
    r"|[\n\r\u2028\u2029\f]"
)

_WORD = re.compile(r"\w+")
_TATWEEL = "\u0640"
_LETTER_FORMS = str.maketrans(
    {"أ": "ا", "إ": "ا", "آ": "ا", "ٱ": "ا", "ى": "ي", "ی": "ي", "ک": "ك", "ة": "ه", "ؤ": "و", "ئ": "ي", _TATWEEL: None}
)
_ARTICLES = ("وال", "بال", "كال", "فال", "لل", "ال")
_LEAST_STEM = 3  # letters left after an article

_ENGLISH_STOP_WORDS = (
    "a an the and or of to in on at by for from with as is are was were be been it its this that these those he she they we you i his her "
    "their our your not no do does did has have had will would can could may there which who what when where how than then so but if into "
    "about also answer question source sources according context"
)
_ARABIC_STOP_WORDS = (  # as `fold_words` spells them
    "في من علي الي عن مع هو هي هذا هذه ذلك تلك التي الذي الذين ان او ثم قد لقد كان كانت يكون تكون ما لا لم لن هل كل بعد قبل عند بين حتي "
    "اذا كما وفي ومن وعلي وهو وهي اي ايضا كيف متي اين حيث غير الا له لها به بها فيه فيها منه منها وقد وكان وكانت"
    " المصدر المصادر السوال الجواب"
)
STOP_WORDS = frozenset(f"{_ENGLISH_STOP_WORDS} {_ARABIC_STOP_WORDS}".split())


def split_sentences(text: str) -> Iterator[tuple[int, int]]:
    """Give the spans of the sentences of a text, in order, without the white space around them; a line break ends one too."""
    start = 0
    for match in _END.finditer(text):
        yield from _trim(text, start, match.end())
        start = match.end()
    yield from _trim(text, start, len(text))


def _trim(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    end -= len(piece) - len(piece.rstrip())
    if start < end:
        yield start, end


def fold_words(text: str) -> list[str]:
    """Give the words of a text in one spelling: case, diacritics, Arabic letter forms, digits, articles and plural s do not tell."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).translate(_LETTER_FORMS))
    letters = "".join(letter for letter in decomposed if unicodedata.category(letter) not in ("Mn", "Cf"))
    return [_fold_word(word) for word in _WORD.findall(letters.casefold())]


def fold_content_words(text: str) -> frozenset[str]:
    """Give the distinct folded words that carry meaning."""
    return frozenset(word for word in fold_words(text) if word not in STOP_WORDS)


def _fold_word(word: str) -> str:
    if word in STOP_WORDS:
        return word
    if word.isdigit():
        return "".join(str(unicodedata.digit(digit)) for digit in word)
    for article in _ARTICLES:
        if word.startswith(article) and len(word) - len(article) >= _LEAST_STEM:
            return word[len(article) :]
    if word.isascii() and len(word) > _LEAST_STEM and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word
