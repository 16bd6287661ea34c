"""Stems of folded words by their script: a light stemmer for Arabic, Snowball for Latin letters."""

import Stemmer

_ENGLISH = Stemmer.Stemmer("english")

# Light10: Larkey, Ballesteros and Connell, "Light Stemming for Arabic Information Retrieval" (2007), over folded letters. Snowball's own
# Arabic stemmer keeps وال and found less on every set that was tried.
_PREFIXES = ("وال", "بال", "كال", "فال", "لل", "ال")
_SUFFIXES = ("ها", "ان", "ات", "ون", "ين", "يه", "ه", "ي")
_AND = "و"
MIN_STEM_CHARACTERS = 2


def is_arabic(word: str) -> bool:
    """Say whether a word is of Arabic letters; words are of one script."""
    return "\u0600" <= word[0] <= "\u08ff"


def stem(word: str) -> str:
    """Take the endings, and in Arabic the article and what is written onto it, off a folded word."""
    if is_arabic(word):
        return _stem_arabic(word)
    return str(_ENGLISH.stemWord(word)) if "a" <= word[0] <= "z" else word


def _stem_arabic(word: str) -> str:
    for prefix in _PREFIXES:
        if word.startswith(prefix) and len(word) - len(prefix) >= MIN_STEM_CHARACTERS:
            word = word[len(prefix) :]
            break
    else:
        if word.startswith(_AND) and len(word) > MIN_STEM_CHARACTERS + 1:
            word = word[1:]
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= MIN_STEM_CHARACTERS:
            word = word[: -len(suffix)]
    return word
