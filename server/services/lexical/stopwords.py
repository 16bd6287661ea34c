"""Words that say nothing of what a text is about, folded as `folding` folds."""

from server.services.lexical.folding import split_words
from server.services.lexical.stemming import is_arabic

_ARABIC = """
في من إلى على عن مع حتى منذ خلال بين عند لدى لدي حول نحو دون ضد سوى غير بعد قبل فوق تحت أمام خلف عبر ضمن أثناء
أو أم ثم بل لكن لكنه لكنها إن أن أنه أنها إنه إنها كأن لأن لأنه لأنها إذا إذ لو لولا كي حيث حين حينما عندما بينما كلما كما أما إما إلا
لا لم لن ما ليس ليست ليسوا قد لقد سوف هل كل بعض جميع أي أية أيا أيضا فقط كذلك هكذا جدا
هذا هذه هذان هاتان هؤلاء ذلك ذاك تلك أولئك هنا هناك الذي التي اللذان اللتان الذين اللاتي اللواتي
ماذا متى أين كيف كم لماذا مما عما فيما بما
أنا نحن أنت أنتم هو هي هما هم هن به بها بهم بهما له لها لهم لهما فيه فيها فيهم منه منها منهم عليه عليها عليهم
إليه إليها عنه عنها معه معها لديه لديها
كان كانت كانوا كنت يكون تكون سيكون ستكون تم يتم
"""
_ENGLISH = """
a an the and or but nor if then else than that this these those there here of in on at by for from to into onto with without within about
as is are was were be been being am do does did doing done has have had having will would shall should can could may might must
i me my mine we us our ours you your yours he him his she her hers it its they them their theirs who whom whose which
what when where why how
not no yes so such too very just only also both each any all some more most other same own over under again further once
s t d ll m re ve don
"""
# What is written onto a function word in Arabic: and, so.
_JOINED = ("و", "ف")

STOP_WORDS = frozenset(split_words(_ARABIC + _ENGLISH))


def is_stop_word(word: str) -> bool:
    """Say whether a folded word is left out; an Arabic one also where وَ or فَ is written onto it."""
    return word in STOP_WORDS or (is_arabic(word) and word.startswith(_JOINED) and word[1:] in STOP_WORDS)
