"""Citations: what is quoted stands in the document word for word and supports the sentence that cites it."""

import time
from dataclasses import replace

import pytest

from server.domain.retrieval import Chunk, Citation, RetrievedChunk, Scores
from server.services.citations import cite_answer

LIBRARY = (
    "Preface, page one.\n"
    "The Qasr library was founded in 1931 by Leila Haddad. It holds forty thousand maps of the coast. "
    "Visitors need a green card. The reading room closes on Fridays."
)
HARBOUR = "ميناء القصر بُني سنة ١٩٥٢ على يد المهندس سالم. يستقبل الميناء عشرين سفينة كل أسبوع. رسوم الرسو مئة دينار."


def retrieved(name: str, original: str, start: int = 0, page: int | None = None) -> RetrievedChunk:
    chunk = Chunk(f"chk_{name}", 0, original[start:], start, len(original), 50, page)
    return RetrievedChunk(chunk, f"doc_{name}", name.title(), Scores(similarity=0.8))


SOURCES = [retrieved("library", LIBRARY, start=LIBRARY.index("The Qasr"), page=3), retrieved("harbour", HARBOUR)]
ORIGINALS = {"doc_library": LIBRARY, "doc_harbour": HARBOUR}


def quotes(answer: str) -> list[str]:
    return [citation.quote for citation in check(answer)]


def check(answer: str) -> tuple[Citation, ...]:
    checked = cite_answer(answer, SOURCES)
    for citation in checked.citations:
        assert ORIGINALS[citation.document_id][citation.char_start : citation.char_end] == citation.quote
    return checked.citations


def test_a_marker_is_cited_with_the_sentence_that_supports_it() -> None:
    (citation,) = check("Leila Haddad founded the library in 1931 [1].")
    assert citation.quote == "The Qasr library was founded in 1931 by Leila Haddad."
    assert (citation.document_id, citation.chunk_id, citation.page) == ("doc_library", "chk_library", 3)


def test_what_is_cited_of_a_chunk_over_two_pages_names_its_own_page() -> None:
    (found, _) = SOURCES
    over_pages = replace(found, page_breaks=(LIBRARY.index("Visitors"), LIBRARY.index("The reading")))
    checked = cite_answer(
        "Leila Haddad founded the library in 1931 [1]. You need a green card. The reading room closes on Fridays [1].", [over_pages]
    )
    assert [citation.page for citation in checked.citations] == [3, 4, 5]


def test_markers_behind_the_full_stop_belong_to_the_sentence_before() -> None:
    assert quotes("You need a green card. [1] The room closes on Fridays. [1]") == [
        "Visitors need a green card.",
        "The reading room closes on Fridays.",
    ]


def test_markers_that_begin_a_line_belong_to_that_line() -> None:
    checked = cite_answer("[1] Visitors need a green card.\n[2] يستقبل الميناء عشرين سفينة كل أسبوع", SOURCES)
    assert [citation.document_id for citation in checked.citations] == ["doc_library", "doc_harbour"]
    assert checked.dropped_count == 0


def test_an_arabic_answer_is_cited_in_any_spelling_and_with_arabic_digits() -> None:
    (citation,) = check("بنى المهندس سالم الميناءَ سنة 1952 [٢].")
    assert citation.quote == "ميناء القصر بُني سنة ١٩٥٢ على يد المهندس سالم."


@pytest.mark.parametrize("answer", ["Maps of the coast [3].", "Maps of the coast [0].", "Maps of the coast [1931]."])
def test_a_marker_of_an_unknown_source_is_dropped_and_counted(answer: str) -> None:
    checked = cite_answer(answer, SOURCES)
    assert checked.citations == ()
    assert checked.dropped_count == 1


def test_a_marker_whose_source_says_nothing_of_the_kind_is_dropped() -> None:
    checked = cite_answer("Penguins live in Antarctica [1]. The tower is green and very high in winter months [2].", SOURCES)
    assert checked.citations == ()
    assert checked.dropped_count == 2


def test_another_number_than_the_source_has_is_not_supported() -> None:
    assert cite_answer("The Qasr library was founded in 1913 by Leila Haddad [1].", SOURCES).dropped_count == 1
    assert check("The Qasr library was founded in 1913 by Leila Haddad.") == ()


def test_a_sentence_without_a_marker_is_attributed_to_what_holds_it() -> None:
    assert quotes("The library holds forty thousand maps.") == ["It holds forty thousand maps of the coast."]
    assert quotes("Leila Haddad") == ["The Qasr library was founded in 1931 by Leila Haddad."]
    assert quotes("1931") == ["The Qasr library was founded in 1931 by Leila Haddad."]


def test_a_sentence_without_a_marker_and_without_support_is_not_cited() -> None:
    assert check("The library is the most beautiful building in town. Yes.") == ()


def test_a_quote_grows_over_neighbouring_sentences_that_are_needed() -> None:
    (citation,) = check("The library, founded in 1931 by Leila Haddad, holds forty thousand maps of the coast [1].")
    assert citation.quote == "The Qasr library was founded in 1931 by Leila Haddad. It holds forty thousand maps of the coast."


def test_the_number_of_a_list_item_is_no_claim() -> None:
    assert quotes("2. Visitors need a green card [1].") == ["Visitors need a green card."]


def test_the_same_passage_is_cited_once_and_several_sources_in_one_marker_each() -> None:
    assert len(check("Visitors need a green card [1]. Green card! Visitors need a green card [1].")) == 1
    checked = cite_answer("Visitors need a green card [1, 2; 7].", SOURCES)
    assert len(checked.citations) == 1
    assert checked.dropped_count == 2


def test_an_empty_answer_and_no_sources_give_no_citation() -> None:
    assert cite_answer("", SOURCES).citations == ()
    assert cite_answer("[1]", SOURCES).dropped_count == 1
    assert cite_answer("Visitors need a green card [1].", []).dropped_count == 1


THREE = [*SOURCES, retrieved("card", "A green card is sold at the gate.")]


@pytest.mark.parametrize(
    ("marker", "sources", "dropped"),
    [
        ("[1]", [1], 0), ("[١]", [1], 0), ("[۱]", [1], 0), ("［１］", [1], 0), ("【1】", [1], 0), ("[^1]", [1], 0), ("[ 1 ]", [1], 0),
        ("[Source 1]", [1], 0), ("[Passage 1]", [1], 0), ("[المصدر ١]", [1], 0), ("[المقطع 1]", [1], 0),
        ("[1, 3]", [1, 3], 0), ("[1,3]", [1, 3], 0), ("[١، ٣]", [1, 3], 0), ("[١؛٣]", [1, 3], 0), ("[1 and 3]", [1, 3], 0),
        ("[١ و ٣]", [1, 3], 0),
        ("[1][3]", [1, 3], 0), ("[1] [3]", [1, 3], 0), ("[1, 1, 1]", [1], 0),
        ("[1-3]", [1, 3], 1), ("[1–3]", [1, 3], 1), ("[١-٣]", [1, 3], 1), ("[1 to 3]", [1, 3], 1), ("[1-1]", [1], 0),
        ("[1, 2]", [1], 1), ("[3-1]", [1, 3], 0), ("[1-9]", [1, 3], 2), ("[1-9999]", [1, 3], 2), ("[0-1]", [1], 1),
        ("[1931-1945]", [], 2), ("[4]", [], 1), ("[0]", [], 1), ("[٤]", [], 1), ("[-1]", [], 0), ("[1.5]", [], 0), ("[12345]", [], 0),
    ],
)  # fmt: skip
def test_every_way_to_write_markers_is_read(marker: str, sources: list[int], dropped: int) -> None:
    checked = cite_answer(f"Visitors need a green card {marker}.", THREE)
    if sources or dropped:  # else it is no marker, and the sentence is attributed to what holds it
        assert sorted(citation.source for citation in checked.citations) == sources
    assert checked.dropped_count == dropped


@pytest.mark.parametrize(
    ("quote", "stands"),
    [
        ('"founded in 1931 by Leila Haddad"', True), ("“founded in 1931 by Leila Haddad”", True), ("«founded in 1931»", True),
        ("„founded in 1931 by Leila”", True), ("‘founded in 1931’", True), ("'founded in 1931'", True),
        ('"Founded IN 1931, by Leila!"', True),
        ('"The Qasr library … by Leila Haddad"', True), ('"by Leila Haddad. It holds forty thousand maps"', True),
        ('"by Leila Haddad. It holds fifty thousand maps"', False), ('"The Qasr library ... by Leila Haddad."', True),
        ('"The Qasr library [...] Leila Haddad."', True),
        ('"founded in 1913 by Leila Haddad"', False), ("“founded in 1931 by Layla Haddad”", False), 
        ("«it was founded by Leila in 1931»", False),
        ("‘founded in 1931 by Haddad’", False), ('"The Qasr library … by Salim Haddad"', False), ('"ten thousand penguins"', False),
    ],
)  # fmt: skip
def test_a_quote_must_stand_in_the_source_word_by_word(quote: str, stands: bool) -> None:
    checked = cite_answer(f"The Qasr library was {quote}, says the founder Leila Haddad of 1931 [1].", SOURCES)
    assert len(checked.citations) == int(stands), checked
    assert checked.dropped_count == int(not stands)


@pytest.mark.parametrize(
    ("answer", "stands"),
    [
        ("يقول المصدر «بني سنة 1952 على يد المهندس سالم» [٢].", True),
        ("يقول المصدر «بُنِيَ سَنَةَ ١٩٥٢ عَلَى يَدِ المُهَندِسِ سَالِم» [2].", True),
        ("يقول المصدر “رسوم الرسو مئة دينار” [٢].", True),
        ("يقول المصدر «رسوم الرسو مئتا دينار» [٢].", False),
        ("يقول المصدر «بني سنة 1953 على يد المهندس سالم» [٢].", False),
    ],
)
def test_arabic_quotes_are_compared_in_any_spelling(answer: str, stands: bool) -> None:
    checked = cite_answer(answer, SOURCES)
    assert [citation.source for citation in checked.citations] == [2] * stands
    assert checked.dropped_count == int(not stands)


def test_a_quote_of_another_source_than_the_named_one_is_dropped() -> None:
    answer = 'The library says "A green card is sold at the gate" to visitors who need a green card {}.'
    assert cite_answer(answer.format("[1]"), THREE).citations == ()
    assert {citation.source for citation in cite_answer(answer.format("[1, 3]"), THREE).citations} == {1, 3}
    assert {citation.source for citation in cite_answer(answer.format(""), THREE).citations} <= {1, 3}


def test_a_made_up_quote_without_a_marker_is_not_attributed() -> None:
    assert cite_answer('"The Qasr library was founded in 1931 by Salim Haddad".', SOURCES).citations == ()


def test_a_name_in_quotation_marks_is_no_quote() -> None:
    assert len(cite_answer('Visitors of the "library" need a "green card" [1].', SOURCES).citations) == 1


@pytest.mark.parametrize("piece", ["[1", "[1, ", '"', "“", "«a ", "[Source ", "‘x ", "[1-", "…"])
def test_odd_answers_cost_linear_time(piece: str) -> None:
    started = time.monotonic()
    cite_answer("Visitors need " + piece * 20_000, SOURCES)
    assert time.monotonic() - started < 3.0


def test_a_quote_s_own_full_stop_ends_its_sentence() -> None:
    answer = 'It says "Visitors need a green card." [1] Penguins live there in the winter months of the year [2].'
    checked = cite_answer(answer, SOURCES)
    assert [citation.quote for citation in checked.citations] == ["Visitors need a green card."]
    assert checked.dropped_count == 1
