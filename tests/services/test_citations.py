"""Citations: what is quoted stands in the document word for word and supports the sentence that cites it."""

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
