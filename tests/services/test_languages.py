"""The language of a question is told by its script and its commonest words, and each language has its sentence."""

import time

import pytest

from server.services.languages import NOTHING_FOUND, Language, detect_language

QUESTIONS = {
    Language.ENGLISH: ["What is the capital of France?", "opening hours", "Harbour fees 2026", "When?", "What is the capital of فرنسا?"],
    Language.ARABIC: ["ما هي عاصمة فرنسا؟", "متى؟", "رسوم الميناء", "ما هو سعر iPhone؟", "مَن أَسَّسَ المَكتَبَة؟"],
    Language.PERSIAN: ["پایتخت فرانسه کجاست؟", "چه کسی این کتابخانه را تأسیس کرد؟"],
    Language.URDU: ["فرانس کا دارالحکومت کیا ہے؟", "لائبریری کب کھلتی ہے؟"],
    Language.FRENCH: ["Où est la bibliothèque ?", "Quelle est la capitale de la France ?", "Combien coûte le billet ?"],
    Language.GERMAN: ["Wo ist die Bibliothek?", "Wie hoch ist der Turm?", "Was kostet ein Ticket?"],
    Language.SPANISH: ["¿Dónde está la biblioteca?", "¿Cuánto cuesta el billete?"],
    Language.PORTUGUESE: ["Onde fica a biblioteca?", "Quanto custa o bilhete e quem não paga?"],
    Language.ITALIAN: ["Dove si trova la biblioteca?", "Quanto costa il biglietto?"],
    Language.DUTCH: ["Waar is de bibliotheek?", "Hoe duur is het kaartje?"],
    Language.TURKISH: ["Kütüphane nerede?", "Bilet ne kadar ve bu kim için?"],
    Language.INDONESIAN: ["Di mana perpustakaan itu?", "Berapa harga tiket untuk anak?"],
    Language.RUSSIAN: ["Где находится библиотека?", "Сколько стоит билет?"],
    Language.UKRAINIAN: ["Де знаходиться бібліотека?", "Скільки коштує квиток?"],
    Language.HEBREW: ["איפה הספרייה?"],
    Language.GREEK: ["Πού είναι η βιβλιοθήκη;"],
    Language.HINDI: ["पुस्तकालय कहाँ है?"],
    Language.THAI: ["ห้องสมุดอยู่ที่ไหน"],
    Language.CHINESE: ["图书馆在哪里？"],
    Language.JAPANESE: ["図書館はどこですか？"],
    Language.KOREAN: ["도서관은 어디에 있습니까?"],
}


@pytest.mark.parametrize(("language", "question"), [(language, text) for language, texts in QUESTIONS.items() for text in texts])
def test_the_language_of_a_question_is_told(language: Language, question: str) -> None:
    assert detect_language(question) is language


def test_every_language_has_a_sentence_in_itself() -> None:
    assert set(NOTHING_FOUND) == set(Language) == set(QUESTIONS)
    for language, sentence in NOTHING_FOUND.items():
        assert detect_language(sentence) is language, sentence


@pytest.mark.parametrize("text", ["", "123 ?", "… — !", "\u0301", "🙂"])
def test_what_tells_nothing_is_spoken_to_in_english(text: str) -> None:
    assert detect_language(text) is Language.ENGLISH


def test_a_long_text_is_told_quickly() -> None:
    started = time.monotonic()
    assert detect_language("كتاب " * 400_000) is Language.ARABIC
    assert time.monotonic() - started < 0.5
