"""Questions that lean on earlier ones are led by their words, in English and Arabic, and others are left as they are."""

import pytest

from server.domain.generation import ChatMessage, Role
from server.services.followups import CONTEXT_BOOST, MAX_LED_WORDS, StandingQuery, make_self_standing
from server.services.lexical.analysis import analyse_query

LIBRARY = "Who founded the Qasr library?"
ARABIC = "من أسس مكتبة القصر في أورفال؟"


def earlier(*questions: str, answer: str = "The answer speaks of penguins.") -> list[ChatMessage]:
    """Questions of the user, each with an answer."""
    turns = []
    for question in questions:
        turns += [ChatMessage(Role.USER, question), ChatMessage(Role.ASSISTANT, answer)]
    return turns


@pytest.mark.parametrize(
    ("query", "led_by"),
    [
        ("When was it opened to visitors?", "founded Qasr library"),
        ("When?", "founded Qasr library"),
        ("And how many maps does the building hold?", "founded Qasr library"),
        ("What about the opening hours on Fridays?", "founded Qasr library"),
        ("How much do they pay for those maps?", "founded Qasr library"),
        ("Why did he leave town?", "founded Qasr library"),
        ("Does the library own those maps?", "founded Qasr"),
    ],
)
def test_a_question_that_leans_takes_the_content_words_of_the_one_before(query: str, led_by: str) -> None:
    standing = make_self_standing(query, earlier(LIBRARY))
    assert (standing.text, standing.context) == (query, led_by)
    assert standing.searched == f"{led_by} {query}"


@pytest.mark.parametrize(
    ("query", "led_by"),
    [
        ("متى افتتحت أبوابها للزوار وما عدد الخرائط فيها؟", "أسس مكتبة القصر أورفال"),
        ("ومتى؟", "أسس مكتبة القصر أورفال"),
        ("كم عدد الخرائط التي فيها اليوم؟", "أسس مكتبة القصر أورفال"),
        ("وماذا عن ساعات العمل الرسمية؟", "أسس مكتبة القصر أورفال"),
        ("أين ولد هو وعائلته؟", "أسس مكتبة القصر أورفال"),
        ("هل يحتاج الزوار إلى بطاقة خضراء هناك؟", "أسس مكتبة القصر أورفال"),
    ],
)
def test_the_same_in_arabic(query: str, led_by: str) -> None:
    assert make_self_standing(query, earlier(ARABIC)).context == led_by


@pytest.mark.parametrize(
    "query",
    [
        "How tall is the lighthouse at Nimmer?",
        "What does an adult ticket cost this year?",
        "Who keeps the lamp of Orvale?",
        "ما هو سعر تذكرة البالغين إلى أوستري؟",
        "من هي مؤسسة مدرسة الصيد في كلدا؟",
        "كم ارتفاع منارة نيمر الشمالية؟",
    ],
)
def test_a_question_that_stands_by_itself_is_left_as_it_is(query: str) -> None:
    assert make_self_standing(query, earlier(LIBRARY, ARABIC)) == StandingQuery(query)


def test_the_first_question_has_nothing_to_lean_on() -> None:
    assert make_self_standing("When was it?", []) == StandingQuery("When was it?")
    assert make_self_standing("When was it?", []).searched == "When was it?"


def test_a_chain_of_leaning_questions_is_followed_to_the_one_that_stands_by_itself() -> None:
    turns = earlier("How tall is the lighthouse at Nimmer?", LIBRARY, "When was it?", "And its closing days?")
    assert make_self_standing("Why?", turns).context == "founded Qasr library closing days"
    assert "penguins" not in make_self_standing("Why?", turns).searched


def test_the_words_are_bounded_and_the_latest_are_kept() -> None:
    long = " ".join(f"word{number}" for number in range(200)) + "?"
    context = make_self_standing("Why is it?", earlier(long)).context.split()
    assert len(context) == MAX_LED_WORDS
    assert context[-1] == "word199"


def test_leading_terms_count_half_and_never_twice() -> None:
    terms = {term.number: term.boost for term in StandingQuery("library maps", "Qasr library").analyse()}
    own = {term.number: term.boost for term in analyse_query("library maps")}
    led = {term.number: term.boost for term in analyse_query("Qasr")}
    assert terms == {**{number: CONTEXT_BOOST * boost for number, boost in led.items()}, **own}
    assert StandingQuery("library maps").analyse() == analyse_query("library maps")
