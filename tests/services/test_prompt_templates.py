"""Prompt templates: what they may hold, what is refused with its reason, and that none can run for long or write much."""

import time
from dataclasses import replace

import pytest

from server.domain.errors import InvalidInput
from server.services.prompt_templates import PromptSource, PromptTurn, PromptValues, check_template, render_template, uses_history

SOURCES = [
    PromptSource(1, "doc_a", "Maps", "It is {question}.", 3, {"year": 2026, "items": "x"}),
    PromptSource(2, "doc_b", "", "There.", None, {}),
]
HISTORY = [PromptTurn("user", "Hi"), PromptTurn("assistant", "Hello")]
VALUES = PromptValues("Where is {{ context }}?", "[1] …", SOURCES, "English", "en", HISTORY)
EVERY_SOURCE = "{% for source in sources %}{{ source.text }}{% endfor %}{{ question }}"


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("C: {{ context }} | Q: {question} | {} {1} ${x", "C: [1] … | Q: Where is {{ context }}? | {} {1} ${x"),
        ("{context} {question} {language} {language_code}", "[1] … Where is {{ context }}? English en"),
        ("{{context}}{{ question | upper }}", "[1] …WHERE IS {{ CONTEXT }}?"),
        (
            "{% for s in sources %}\n{{ loop.index }}/{{ loop.length }} {{ s.title | default('?', true) }} {{ s.text }} {{ s.page }}\n"
            "{% endfor %}\n{{ question }}",
            "1/2 Maps It is {question}. 3\n2/2 ? There. None\nWhere is {{ context }}?",
        ),
        (
            EVERY_SOURCE + "{% if language_code == 'ar' %}أجب{% else %}Answer{% endif %}",
            "It is {question}.There.Where is {{ context }}?Answer",
        ),
        (
            "{context}{question}{% for turn in history %}\n<{{ turn.role }}> {{ turn.content }}{% endfor %}",
            "[1] …Where is {{ context }}?<user> Hi<assistant> Hello",
        ),
        (
            "{context}{question}{{ sources[0].metadata.year }}{{ sources[0].metadata['items'] }}{{ sources[1].metadata.year }}",
            "[1] …Where is {{ context }}?2026x",
        ),
    ],
)  # fmt: skip
def test_templates_are_filled_once_and_values_are_not_read_as_templates(template: str, written: str) -> None:
    check_template(template)
    assert render_template(template, VALUES) == written


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "does not write the question"),
        ("{context}", "{question}"),
        ("{question}", "{context}"),
        ("{question}{{ sources[0].text }}", "{context}"),
        ("{{ context }}{% if false %}{{ question }}{% endif %}", "{question}"),
        ("{context} {question} {secret}", "knows no variable {secret}"),
        ("{context} {question} {{ settings }}", "knows no variable {settings}"),
        ("{context} {question} {{ self }}", "{self}"),
        ("{context} {question} {{ loop.index }}", "{loop}"),
        ("{context} {question} {{ sources[0][question] }}", "fixed item"),
        ("{context} {question} {{ cycler() }}", "{cycler}"),
        ("{context} {question} {% for x in y %}{% endfor %}", "loop over sources or history"),
        ("{context} {question} {% for x in", "is not a template"),
        ("{context} {question} {{ question | pprint }}", "pprint"),
        ("{context} {question} {{ question | replace('a', context) }}", "replace"),
        ("{context} {question} {{ question.upper() }}", "may not use call"),
        ("{context} {question} {{ sources[question] }}", "fixed item"),
        ("{context} {question} {{ sources[:1] }}", "may not use slice"),
        ("{context} {question} {% set x = question %}", "may not use assign"),
        ("{context} {question} {% macro f() %}{% endmacro %}", "may not use macro"),
        ("{context} {question} {% include 'x' %}", "may not use include"),
        ("{context} {question} {% extends 'x' %}", "may not use extends"),
        ("{context} {question} {% import 'x' as y %}", "may not use import"),
        ("{context} {question} {{ 'a' * 1000000000 }}", "may not use mul"),
        ("{context} {question} {{ 9 ** 9 ** 9 ** 9 }}", "may not use pow"),
        ("{context} {question} {{ question ~ context }}", "may not use concat"),
    ],
)
def test_what_is_refused_is_refused_with_its_reason(template: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_template(template)
    assert words in str(refused.value)
    assert refused.value.data.violations[0].field == "prompt_template"
    assert refused.value.reason == "PROMPT_TEMPLATE_INVALID"


NESTED = "{% for a in sources %}{% for b in sources %}{% for c in sources %}x{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "attack",
    [
        "{% for x in range(1000000000) %}x{% endfor %}",
        "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}",
        NESTED,
        "{% for x in sources recursive %}{{ loop(sources) }}{% endfor %}",
        "{% for x in question %}x{% endfor %}",
        "{{ lipsum(n=100000) }}",
        "{{ question | center(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format('x') }}",
        "{{ 'x' | indent(1000000000) }}",
        "{% set x = question %}" + "{% set x = x ~ x %}" * 40,
        "{{ " + "(" * 5_000 + "question" + ")" * 5_000 + " }}",
        "{{ " + "not " * 5_000 + "question }}",
        "{% if question %}" * 200 + "{% endif %}" * 200,
    ],
    ids=lambda attack: attack[:40],
)
def test_no_template_can_run_for_long(attack: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidInput):
        check_template("{context} {question}" + attack)
    assert time.monotonic() - started < 1.0


def test_what_is_written_is_bounded() -> None:
    template = "{question}" + "{context}" * 1_000
    check_template(template)
    started = time.monotonic()
    with pytest.raises(InvalidInput, match="more than 2,000,000 characters"):
        render_template(template, replace(VALUES, context="x" * 1_000_000))
    assert time.monotonic() - started < 1.0


def test_a_loop_over_a_thousand_sources_is_quick() -> None:
    template = "{question}{% for source in sources %}{{ source.text }}" + "{% if source.page == 3 %}{% endif %}" * 400 + "{% endfor %}"
    check_template(template)
    started = time.monotonic()
    assert render_template(template, replace(VALUES, sources=SOURCES * 500)).count("There.") == 500
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    "inside",
    ["sources[0].keys", "sources[0].metadata.update", "question.format", "sources.append", "sources[0].__class__", "''.__class__.__mro__"],
)
def test_data_have_no_methods_and_no_inside(inside: str) -> None:
    assert render_template(f"{{{{ {inside} }}}}", VALUES) == ""


def test_a_template_that_writes_the_history_is_known() -> None:
    assert uses_history("{context}{question}{% for turn in history %}{{ turn.content }}{% endfor %}")
    assert not uses_history("{context} {question} history")
