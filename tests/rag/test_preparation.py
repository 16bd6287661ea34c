"""Text preparation: what AraBERT and CAMeLBERT expect, and the way back to the original's characters."""

import pytest

from server.domain.catalogue import Preparation
from server.rag.preparation import prepare_text


@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("كَتَبَ الوَلَدُ الدَّرْسَ", "كتب الولد الدرس"),
        ("جمـــيل", "جميل"),
        ("قال: نعم،لا!", "قال : نعم ، لا !"),
        ("عام٢٠٢٤م", "عام 2024 م"),
        ("۱۲۳", "123"),
        ("أ &amp; ب &lt;ج&gt;", "أ & ب < ج >"),
        ("أحمد وإيمان آمنا بالمكتبة على", "أحمد وإيمان آمنا بالمكتبة على"),
        ("a&unknown;b", "a & unknown ; b"),
    ],
)
def test_arabert_v02_reads_plain_spaced_text_with_its_letters_unfolded(text: str, prepared: str) -> None:
    assert prepare_text(text, Preparation.ARABERT_V02).text == prepared


def test_camelbert_reads_text_without_diacritics_and_tatweel() -> None:
    assert prepare_text("كَتَبَ،جمـــيل ١٢", Preparation.UNDIACRITIZED).text == "كتب،جميل ١٢"


@pytest.mark.parametrize("preparation", [Preparation.ARABERT_V02, Preparation.UNDIACRITIZED])
def test_each_letter_knows_where_it_stood(preparation: Preparation) -> None:
    text = "كَتَبَ &amp; جمـيل،x٢"
    prepared = prepare_text(text, preparation)
    for place, letter in enumerate(prepared.text):
        if letter.isalpha():
            assert text[prepared.find_origin(place)] == letter
    assert prepared.origins is not None
    assert list(prepared.origins) == sorted(prepared.origins)


def test_other_families_read_the_text_as_it_is() -> None:
    assert prepare_text("كَتَبَ &amp; ـ", Preparation.NONE).text == "كَتَبَ &amp; ـ"


@pytest.mark.parametrize("preparation", list(Preparation))
def test_presentation_forms_are_read_as_letters_and_controls_not_at_all(preparation: Preparation) -> None:
    text = "\u202bﻣﺪﺭﺳﺔ\u202c ﻻ\u200b شيء\ufeff"
    prepared = prepare_text(text, preparation)
    assert prepared.text == "مدرسة لا شيء"
    assert [text[prepared.find_origin(place)] for place, letter in enumerate(prepared.text) if letter in "ملا"] == ["ﻣ", "ﻻ", "ﻻ"]
    assert prepared.find_origin(len(prepared.text) - 1) == len(text) - 2


@pytest.mark.parametrize("preparation", [Preparation.NONE, Preparation.ARABERT_V02, Preparation.UNDIACRITIZED])
def test_half_a_surrogate_pair_becomes_a_replacement_character(preparation: Preparation) -> None:
    prepared = prepare_text("a \ud800 &#xD800; b", preparation).text
    prepared.encode()
    assert "\ufffd" in prepared
