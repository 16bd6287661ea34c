"""Terms of passages and queries: alike whatever the spelling, Arabic and English and others, and bounded."""

import pytest

from server.services.lexical.analysis import (
    MAX_PASSAGE_TERMS,
    MAX_QUERY_TERMS,
    TERM_NUMBERS,
    analyse_passage,
    analyse_query,
)
from server.services.lexical.folding import MAX_WORD_CHARACTERS, split_words
from server.services.lexical.stemming import stem
from server.services.lexical.stopwords import is_stop_word


def words_of(text: str) -> set[int]:
    return {term.number for term in analyse_query(text) if term.is_word}


@pytest.mark.parametrize(
    ("written", "also"),
    [
        ("أحمد إلى آخر ٱلكتاب", "احمد الى اخر الكتاب"),
        ("مستشفى", "مستشفي"),
        ("مدرسة", "مدرسه"),
        ("كِتَابٌ مُدَرَّسٌ", "كتاب مدرس"),
        ("كتـــاب", "كتاب"),
        ("سؤال قائمة", "سوال قايمه"),
        ("کتاب فارسی", "كتاب فارسي"),
        ("١٩٥٨ ۱۹۵۸", "1958 1958"),
        ("\ufe8d\ufedf\ufedc\ufe98\ufe8e\ufe8f", "الكتاب"),  # presentation forms, as PDFs have them
        ("\u202bكتاب\u202c\u200f", "كتاب"),
        ("Café ＡＢＣ Straße", "cafe abc strasse"),
        ("e\u0301te\u0301", "été"),
    ],
)
def test_what_is_written_in_many_ways_is_folded_into_one(written: str, also: str) -> None:
    assert split_words(written) == split_words(also)
    assert analyse_query(written) == analyse_query(also)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("متى وُلد؟ في مكة، سنة 570!", ["متي", "ولد", "في", "مكه", "سنه", "570"]),
        ("بالـGPS والـAPI", ["بال", "gps", "وال", "api"]),
        ("state-of-the-art don't e_mail", ["state", "of", "the", "art", "don", "t", "e", "mail"]),
        ("東京都庁", ["東京", "京都", "都庁"]),
        ("한국어 हिन्दी", ["한국어", "हिन्दी"]),
        ("\x00 ؟ ٪ … 😀", []),
    ],
)
def test_texts_are_cut_into_words_by_script(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize(
    "forms",
    [
        ["الكتاب", "والكتاب", "بالكتاب", "كتاب", "كتابها"],
        ["المعلمين", "معلمون", "والمعلمات", "للمعلم"],
        ["running", "runs", "run"],
        ["libraries", "library"],
    ],
)
def test_forms_of_a_word_have_one_stem(forms: list[str]) -> None:
    assert len({stem(word) for form in forms for word in split_words(form)}) == 1


@pytest.mark.parametrize("word", ["من", "به", "ولد", "وال", "of", "a", "570"])
def test_a_stem_never_loses_the_whole_word(word: str) -> None:
    assert len(stem(word)) >= min(len(word), 2)


def test_function_words_are_no_words_but_still_found_by_their_letters() -> None:
    for text in ("من هو", "ومن في وهل", "what is the", "إلى أن"):
        assert all(is_stop_word(word) for word in split_words(text))
        assert not words_of(text)
        assert analyse_query(text)
    assert not is_stop_word("وهران")


def test_another_form_that_no_stem_meets_shares_letters() -> None:
    books, book = analyse_passage("طرابلس"), analyse_query("طرابلسي")
    assert any(term.number in books.weights for term in book)
    misspelt = {term.number for term in analyse_query("Photosyntesis")}
    assert len(misspelt & analyse_passage("photosynthesis").weights.keys()) > 5


def test_a_query_has_the_terms_of_the_passage_that_it_is() -> None:
    for text in ("وُلد جمال خاشقجي في المدينة المنورة سنة 1958.", "The lighthouse keeper's two daughters"):
        assert {term.number for term in analyse_query(text)} == analyse_passage(text).weights.keys()
        assert words_of(text) == analyse_passage(text).words


def test_a_term_weighs_more_the_more_often_it_stands_and_the_shorter_the_passage_is() -> None:
    (word,) = words_of("harbour")
    once, twice = (analyse_passage(text).weights[word] for text in ("harbour wall", "harbour harbour"))
    long = analyse_passage("harbour " + "stone " * 300).weights[word]
    assert long < once < twice < 2.2


def test_no_text_is_too_long() -> None:
    assert split_words("x" * 100_000) == ["x" * MAX_WORD_CHARACTERS]
    many = " ".join(f"w{number:x}q" for number in range(30_000))
    passage = analyse_passage(many)
    assert len(passage.weights) == MAX_PASSAGE_TERMS
    assert passage.words <= passage.weights.keys()
    assert all(1 <= number <= TERM_NUMBERS for number in passage.weights)
    assert len(analyse_query(many)) == MAX_QUERY_TERMS
    assert analyse_passage("\ud800 half").weights
