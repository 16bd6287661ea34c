"""Which language a question is in, by its script and its commonest words, and what this service itself says in it. Knows no model."""

from collections import Counter
from enum import StrEnum

import regex

MAX_CHARACTERS = 4_000  # of a text that are looked at


class Language(StrEnum):
    """The languages that are told apart, by their ISO 639-1 codes."""

    ENGLISH = "en"
    ARABIC = "ar"
    PERSIAN = "fa"
    URDU = "ur"
    FRENCH = "fr"
    GERMAN = "de"
    SPANISH = "es"
    PORTUGUESE = "pt"
    ITALIAN = "it"
    DUTCH = "nl"
    TURKISH = "tr"
    INDONESIAN = "id"
    RUSSIAN = "ru"
    UKRAINIAN = "uk"
    HEBREW = "he"
    GREEK = "el"
    HINDI = "hi"
    THAI = "th"
    CHINESE = "zh"
    JAPANESE = "ja"
    KOREAN = "ko"

    @property
    def english_name(self) -> str:
        """The language's name in English, as an instruction to a model names it."""
        return self.name.capitalize()


NOTHING_FOUND = {
    Language.ENGLISH: "Nothing in the documents answers this question.",
    Language.ARABIC: "لا يوجد في الوثائق ما يجيب عن هذا السؤال.",
    Language.PERSIAN: "در اسناد چیزی نیست که به این پرسش پاسخ دهد.",
    Language.URDU: "دستاویزات میں اس سوال کا جواب نہیں ہے۔",
    Language.FRENCH: "Rien dans les documents ne répond à cette question.",
    Language.GERMAN: "Nichts in den Dokumenten beantwortet diese Frage.",
    Language.SPANISH: "Nada en los documentos responde a esta pregunta.",
    Language.PORTUGUESE: "Nada nos documentos responde a esta pergunta.",
    Language.ITALIAN: "Nulla nei documenti risponde a questa domanda.",
    Language.DUTCH: "Niets in de documenten beantwoordt deze vraag.",
    Language.TURKISH: "Belgelerde bu soruyu yanıtlayan bir şey yok.",
    Language.INDONESIAN: "Tidak ada dalam dokumen yang menjawab pertanyaan ini.",
    Language.RUSSIAN: "В документах нет ответа на этот вопрос.",
    Language.UKRAINIAN: "У документах немає відповіді на це запитання.",
    Language.HEBREW: "אין במסמכים תשובה לשאלה זו.",
    Language.GREEK: "Τίποτα στα έγγραφα δεν απαντά σε αυτή την ερώτηση.",
    Language.HINDI: "दस्तावेज़ों में इस प्रश्न का उत्तर नहीं है।",
    Language.THAI: "ในเอกสารไม่มีคำตอบของคำถามนี้",
    Language.CHINESE: "文档中没有回答这个问题的内容。",
    Language.JAPANESE: "この質問に答える内容は文書にありません。",
    Language.KOREAN: "문서에 이 질문에 답하는 내용이 없습니다.",
}

_SCRIPTS = {
    "arabic": Language.ARABIC,
    "cyrillic": Language.RUSSIAN,
    "hebrew": Language.HEBREW,
    "greek": Language.GREEK,
    "devanagari": Language.HINDI,
    "thai": Language.THAI,
    "kana": Language.JAPANESE,
    "han": Language.CHINESE,
    "hangul": Language.KOREAN,
    "latin": Language.ENGLISH,
}
_LETTERS = regex.compile(
    r"(?V1)(?P<arabic>[\p{Arabic}&&\p{L}])|(?P<cyrillic>\p{Cyrillic})|(?P<hebrew>[\p{Hebrew}&&\p{L}])|(?P<greek>\p{Greek})"
    r"|(?P<devanagari>\p{Devanagari})|(?P<thai>\p{Thai})|(?P<kana>[\p{Hiragana}\p{Katakana}])|(?P<han>\p{Han})|(?P<hangul>\p{Hangul})"
    r"|(?P<latin>[\p{Latin}&&\p{L}])"
)
_WORD = regex.compile(r"[\p{L}\p{M}]+")
# The commonest words of languages that share a script, those that questions are made of first.
_WORDS: dict[str, dict[Language, frozenset[str]]] = {
    script: {Language(code): frozenset(words.split()) for code, words in languages.items()}
    for script, languages in {
        "latin": {
            "en": "the of and to in is are was were what which who where when why how does did do can for with it that this",
            "fr": "le la les des du et est sont que qui quoi où quand comment pourquoi combien quel quelle une dans pour avec il ce cette",
            "de": "der die das und ist sind was wer wo wann warum wie welche ein eine einen den dem des zu nicht für diese nichts",
            "es": "el la los las y es son qué que quién dónde cuándo cómo cuánto cuál por una un en con para del se está",
            "pt": "o a os as e é são que quem onde quando como quanto qual uma um em com para do da dos das não se no na",
            "it": "il lo la gli le e è sono che chi dove quando come quanto quale perché una un di in con per del nel nei questa cosa",
            "nl": "de het een en is zijn wat wie waar wanneer waarom hoe welke van in met voor op te niet dat die er worden naar",
            "tr": "ve bir bu ne kim nerede zaman neden nasıl hangi kaç mı mi mu mü için ile var olan en da de nedir kimdir",
            "id": "yang dan di ke dari apa siapa kapan mengapa bagaimana berapa adalah itu ini untuk dengan pada tidak mana dalam",
        },
        "arabic": {
            "ar": "في من على إلى ما متى أين كيف كم هل هو هي التي الذي هذا هذه أن إن عن ماذا لماذا",
            "fa": "از به که را است این آن در چه چیست کی کجا چرا چگونه چند آیا برای با شد می های کدام بود",
            "ur": "ہے ہیں کا کی کے میں کیا کون کہاں کب کیوں کیسے کتنا کتنے سے کو پر اور یہ وہ نے تھا تھی",
        },
        "cyrillic": {
            "ru": "и в на что кто где когда почему как сколько какой какая это не с по из к был была для чем ли",
            "uk": "і в на що хто де коли чому як скільки який яка це не з по до був була для чим чи та у є",
        },
    }.items()
}  # fmt: skip
# Letters that only one of them writes, worth as much as a word each.
_MARKS = {
    Language.PERSIAN: "پچژگکی",
    Language.URDU: "ٹڈڑےںھہ",
    Language.UKRAINIAN: "іїєґ",
    Language.RUSSIAN: "ыэъё",
    Language.GERMAN: "äöß",
    Language.SPANISH: "ñ¿¡",
    Language.PORTUGUESE: "ãõ",
    Language.TURKISH: "ığş",
    Language.FRENCH: "œèêû",
}


def detect_language(text: str) -> Language:
    """Tell the language of most of a text's letters; English where nothing tells."""
    looked_at = text[:MAX_CHARACTERS].casefold()
    letters = Counter(match.lastgroup for match in _LETTERS.finditer(looked_at))
    if not letters:
        return Language.ENGLISH
    script = letters.most_common(1)[0][0] or "latin"
    if script == "han" and letters["kana"]:
        script = "kana"
    languages = _WORDS.get(script)
    if not languages:
        return _SCRIPTS[script]
    words = _WORD.findall(looked_at)
    points = {language: sum(word in known for word in words) for language, known in languages.items()}
    for language in languages:
        points[language] += sum(mark in looked_at for mark in _MARKS.get(language, ""))
    best = max(points.values())
    usual = _SCRIPTS[script]
    return usual if points[usual] == best else next(language for language, count in points.items() if count == best)
