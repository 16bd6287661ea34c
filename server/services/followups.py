"""Makes the latest question of a conversation stand by itself for a search, without asking a model: words of earlier questions lead it.

A question leans on earlier ones where it points back ("it", "there", "هو", "فيها") or is too short to be found by. Then it takes the
content words of the user's turns before it, up to the last one that stands by itself. Only the user's: what a model said may be wrong,
and its many words would drown the question's. Their terms count half in the search by words, for the question itself is what is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.domain.generation import ChatMessage, Role
from server.domain.retrieval import QueryTerm
from server.services.lexical.analysis import MAX_QUERY_TERMS, analyse_query
from server.services.lexical.folding import split_words
from server.services.lexical.stopwords import is_stop_word

MAX_LED_WORDS = 32
MAX_TURNS = 4
# A question of fewer content words names no subject that a search could go by.
LEAST_CONTENT_WORDS = 2
CONTEXT_BOOST = 0.5

_POINTING_BACK = (
    "it its they them their theirs he him his she her hers this that these those there then one ones former latter same else other another "
    "هو هي هما هم هن هذا هذه ذلك تلك هؤلاء أولئك هناك هنالك حينها عندها منه منها منهم فيه فيها فيهم به بها بهم له لها لهم عنه عنها عنهم "
    "عليه عليها عليهم إليه إليها إليهم معه معها معهم لديه لديها لديهم أيضا كذلك نفسه نفسها غيره غيرها"
)
_FOLLOWING_ON = ("and", "what about", "how about", "but", "or", "also", "ماذا عن", "وماذا عن", "ماذا بشأن")
# هو and هي after a question word only ask ("ما هو سعر التذكرة؟"): they point at what follows them.
_ASKING = "ما من وما ومن ماذا متى كم أين كيف لماذا"


def _fold(texts: str) -> frozenset[str]:
    return frozenset(split_words(texts))


POINTING_BACK = _fold(_POINTING_BACK)
ASKING = _fold(_ASKING)
COPULAS = _fold("هو هي هم هن")
FOLLOWING_ON = tuple(tuple(split_words(phrase)) for phrase in _FOLLOWING_ON)
# "this year" points at the calendar, not at what was said.
THIS_IS_NOW = _fold("year week month day morning evening summer winter العام السنة الأسبوع الشهر اليوم الصباح المساء الصيف الشتاء")
DETERMINERS = _fold("this that these those هذا هذه ذلك تلك هؤلاء")


@dataclass(frozen=True, slots=True)
class StandingQuery:
    """A question, and the words of earlier ones that lead it; empty: it stands by itself."""

    text: str
    context: str = ""

    @property
    def searched(self) -> str:
        """What is searched for, as one text."""
        return f"{self.context} {self.text}" if self.context else self.text

    def analyse(self) -> tuple[QueryTerm, ...]:
        """Give the terms that are searched for: the question's own, then those of the leading words, which count less."""
        own = analyse_query(self.text)
        known = {term.number for term in own}
        led = (replace(term, boost=CONTEXT_BOOST * term.boost) for term in analyse_query(self.context) if term.number not in known)
        return (*own, *led)[:MAX_QUERY_TERMS]


def make_self_standing(query: str, earlier: Sequence[ChatMessage]) -> StandingQuery:
    """Lead a question that leans on earlier ones by their content words, the latest of them first to be kept."""
    if not _leans(query):
        return StandingQuery(query)
    turns = [message.content for message in earlier if message.role is Role.USER]
    words: list[str] = []
    known = set(split_words(query))
    for turn in turns[: -MAX_TURNS - 1 : -1]:
        words = _find_new_words(turn, known) + words
        if not _leans(turn):
            break
    return StandingQuery(query, " ".join(words[-MAX_LED_WORDS:]))


def _leans(query: str) -> bool:
    words = split_words(query)
    if any(tuple(words[: len(phrase)]) == phrase for phrase in FOLLOWING_ON):
        return True
    if sum(not is_stop_word(word) for word in words) < LEAST_CONTENT_WORDS:
        return True
    return any(_points_back(words, place) for place in range(len(words)))


def _points_back(words: Sequence[str], place: int) -> bool:
    word = words[place]
    if word not in POINTING_BACK:
        return False
    if word in COPULAS and place and words[place - 1] in ASKING:
        return False
    follows = words[place + 1] if place + 1 < len(words) else ""
    return not (word in DETERMINERS and follows in THIS_IS_NOW)


def _find_new_words(turn: str, known: set[str]) -> list[str]:
    """Give the content words of a turn as they are written there, each once."""
    found = []
    for written in turn.split():
        folded = [word for word in split_words(written) if not is_stop_word(word)]
        if folded and not known.issuperset(folded):
            known.update(folded)
            found.append(written.strip("?؟!.,،;؛:\"'()[]«»…"))
    return found
