"""Sentences and folded words, Arabic and English, and that odd texts cost no more than linear time."""

import time

import pytest

from server.services.sentences import fold_content_words, fold_words, split_sentences

LINEAR_SECONDS = 2.0


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


def test_english_sentences_end_at_marks_before_a_space_and_at_line_breaks() -> None:
    assert cut('He left. "Why?" she asked! Wait… Then\na new line') == ["He left.", '"Why?"', "she asked!", "Wait…", "Then", "a new line"]


def test_numbers_initials_and_titles_do_not_end_a_sentence() -> None:
    assert cut("Dr. J. Doe paid 3.14 to example.org, i.e. nothing.") == ["Dr. J. Doe paid 3.14 to example.org, i.e. nothing."]


def test_arabic_sentences_end_at_their_own_marks_even_without_a_space() -> None:
    assert cut("أين المكتبة؟في وسط المدينة؛ وهي كبيرة. انتهى!") == ["أين المكتبة؟", "في وسط المدينة؛", "وهي كبيرة.", "انتهى!"]


@pytest.mark.parametrize("odd", ["." * 200_000, "؟" * 200_000, ".)" * 100_000, " " * 200_000, "a" * 200_000, "?!" * 100_000])
def test_runs_of_one_mark_cost_linear_time(odd: str) -> None:
    started = time.monotonic()
    assert sum(1 for _ in split_sentences(odd)) <= 1
    assert time.monotonic() - started < LINEAR_SECONDS


def test_spellings_of_one_arabic_word_fold_to_one() -> None:
    assert len({tuple(fold_words(word)) for word in ("أَحْمَد", "احمد", "إحمد", "أحمـــد", "ٱحمد")}) == 1
    assert fold_words("المدرسةُ ١٢٣") == fold_words("مدرسه 123")
    assert fold_words("مستشفى") == fold_words("والمستشفي")


def test_content_words_leave_out_what_every_sentence_has() -> None:
    assert fold_content_words("The library is in the old house") == {"library", "old", "house"}
    assert fold_content_words("المكتبة في البيت القديم") == {"مكتبه", "بيت", "قديم"}
