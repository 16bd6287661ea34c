"""Arabic letters and order: presentation forms, reversed lines, brackets."""

import pytest
from bidi.algorithm import get_display

from server.rag.parsing.arabic import is_reversed, join_forms, mend_brackets, mend_percents, remove_controls, turn_line

LINES = [
    "اللغة العربية لغة جميلة، عدد المدارس 1250 مدرسة في مدينة الرياض.",
    "استعمل machine learning مع Windows 11 Pro والنموذج GPT-4o بنسبة 12.5% في 2024/05/06 (انظر الصفحة 3).",
    "بلغ العدد 5 من 10 سنة ٢٠٢٤",
    "كَتَبَ الدرسَ في المَدْرَسَةِ [الكبيرة]",
    "The word مدرسة كبيرة means (a school) here",
    "No Arabic at all (1250).",
]


@pytest.mark.parametrize(
    ("forms", "letters"),
    [
        ("ﻣﺪﺭﺳﺔ", "مدرسة"),
        ("ﻻ ﻷ ﻹ ﻵ", "لا لأ لإ لآ"),
        ("ﷲ", "الله"),
        ("ﷺ", "ﷺ"),
        ("ﹶ ﹷ ﱠ", "َ َ َّ"),
        ("ﭘﭽﮔﯽ", "پچگی"),
        ("ﬁle x² ½ ①", "file x² ½ ①"),
    ],
)
def test_presentation_forms_become_letters_and_nothing_else_changes(forms: str, letters: str) -> None:
    assert join_forms(forms) == letters


@pytest.mark.parametrize("line", LINES)
def test_a_line_drawn_by_the_bidi_algorithm_is_turned_back(line: str) -> None:
    assert turn_line(str(get_display(line))) == line


@pytest.mark.parametrize("line", LINES)
def test_reversed_arabic_is_told_from_arabic(line: str) -> None:
    assert not is_reversed(line)
    assert is_reversed(str(get_display(line))) == any("\u0621" <= letter <= "\u064a" for letter in line)


def test_words_that_end_as_a_reversed_article_does_are_not_taken_for_reversed() -> None:
    assert not is_reversed("لا أولا مثلا قليلا طويلا جميلا")


def test_brackets_of_an_arabic_line_are_mirrored_only_where_that_pairs_them() -> None:
    assert mend_brackets("قال )نعم( ثم ]لا[") == "قال (نعم) ثم [لا]"
    assert mend_brackets("1) قال (نعم)") == "1) قال (نعم)"
    assert mend_brackets(")no Arabic(") == ")no Arabic("


def test_percent_signs_of_an_arabic_line_follow_their_numbers() -> None:
    assert mend_percents("بنسبة %12.5 من 30%") == "بنسبة 12.5% من 30%"
    assert mend_percents("%12 here") == "%12 here"


def test_controls_go_and_joiners_stay() -> None:
    assert remove_controls("\u202bمي\u200cروم\u202c\u200e x\ufeff 👩\u200d👧") == "مي\u200cروم x 👩\u200d👧"
