"""Prompt templates of RAG models: a small part of Jinja, in its sandbox, that can neither run for long nor write much.

What is allowed makes it so: no calls, no arithmetic, no assignments, one loop at a time and over sources or turns only. Every template is
tried before it is kept.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.domain.errors import InvalidInput
from server.domain.retrieval import MetadataValue

MAX_OUTPUT_CHARACTERS = 2_000_000  # as any message
MAX_SECONDS = 1.0
MAX_DEPTH = 40
REASON = "PROMPT_TEMPLATE_INVALID"
VARIABLES = ("question", "context", "sources", "language", "language_code", "history")
LOOPED_OVER = ("sources", "history")
FILTERS = ("trim", "upper", "lower", "title", "capitalize", "length", "count", "default", "d", "first", "last", "string")
TESTS = ("defined", "undefined", "none")
LOOP_FIELDS = ("index", "index0", "first", "last", "length")

# {question}, as templates were written before they were Jinja; braces around anything that is no name stand for themselves.
_PLAIN = re.compile(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})")
_ALLOWED = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.If, nodes.For,
    nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Filter, nodes.Test, nodes.Keyword,
)  # fmt: skip
_SAMPLES = ("\ue001\ue010", "\ue002\ue010", "\ue003\ue010")  # of the question and two sources; no filter changes them


@dataclass(frozen=True, slots=True)
class PromptSource:
    """A source as a template sees it; every text in it is quoted for the model."""

    number: int
    document_id: str
    title: str
    text: str
    page: int | None
    metadata: Mapping[str, MetadataValue]


@dataclass(frozen=True, slots=True)
class PromptTurn:
    """An earlier turn as a template sees it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PromptValues:
    """What a template is filled with. `context` is the sources, numbered and written out."""

    question: str
    context: str
    sources: Sequence[PromptSource]
    language: str
    language_code: str
    history: Sequence[PromptTurn] = ()


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which data have no methods: a dot gives what a mapping holds, or a field of `loop`."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, LoopContext) and attribute in LOOP_FIELDS:
            return super().getattr(obj, attribute)
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Mapping | list | tuple) and isinstance(argument, str | int):
            try:
                return obj[argument]  # type: ignore[index]  # whatever does not fit is undefined
            except (LookupError, TypeError):
                pass
        return self.undefined(obj=obj, name=argument)


def check_template(template: str) -> None:
    """Raise InvalidInput where a prompt template is none, could run for long, or leaves out the question or the sources."""
    try:
        problems = _find_problems(_translate(template)) or _try_out(template)
    except (TemplateError, SyntaxError) as error:
        problems = [f"is not a template: {_explain(error)}"]
    except (RecursionError, MemoryError):
        problems = ["is nested too deep"]
    if problems:
        raise InvalidInput.field("prompt_template", "; ".join(dict.fromkeys(problems)), reason=REASON)


def render_template(template: str, values: PromptValues) -> str:
    """Fill a template that was checked. Raises InvalidInput for one that writes too much or takes too long."""
    pieces: list[str] = []
    size, end = 0, time.monotonic() + MAX_SECONDS
    try:
        for piece in _compile(template).generate(asdict(values)):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT_CHARACTERS:
                raise InvalidInput.field("prompt_template", f"writes more than {MAX_OUTPUT_CHARACTERS:,} characters", reason=REASON)
            if time.monotonic() > end:
                raise InvalidInput.field("prompt_template", f"takes longer than {MAX_SECONDS:g} s to fill", reason=REASON)
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidInput.field("prompt_template", f"cannot be filled: {_explain(error)}", reason=REASON) from error
    return "".join(pieces)


def uses_history(template: str) -> bool:
    """Say whether a template writes the earlier turns itself."""
    return any(name.name == "history" for name in _environment().parse(_translate(template)).find_all(nodes.Name))


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.globals.clear()
    environment.filters = {name: environment.filters[name] for name in FILTERS}
    environment.tests = {name: environment.tests[name] for name in TESTS}
    return environment


@lru_cache(maxsize=256)
def _compile(template: str) -> Template:
    return _environment().from_string(_translate(template))


def _translate(template: str) -> str:
    """Write {question} as Jinja does; an unknown name in single braces stays, and is told by `_find_problems`."""
    return _PLAIN.sub(lambda match: f"{{{{ {match[1]} }}}}", template)


def _find_problems(source: str) -> list[str]:
    """Look through the tree before anything of it is computed: Jinja works out constants when it compiles."""
    problems: list[str] = []
    for node, depth, names in _walk(_environment().parse(source), 0, frozenset(VARIABLES)):
        if depth > MAX_DEPTH:
            return ["is nested too deep"]
        if not isinstance(node, _ALLOWED):
            problems.append(f"may not use {type(node).__name__.lower()} (line {node.lineno})")
        if isinstance(node, nodes.Name) and node.ctx == "load" and node.name not in names:
            problems.append(f"knows no variable {{{node.name}}}")
        if isinstance(node, nodes.For) and not _may_loop(node, names):
            problems.append(f"may loop over sources or history only, and not inside a loop (line {node.lineno})")
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Const):
            problems.append(f"may take only a fixed item out of something (line {node.lineno})")
    return problems


def _walk(node: nodes.Node, depth: int, names: frozenset[str]) -> Iterator[tuple[nodes.Node, int, frozenset[str]]]:
    """Give every node with its depth and the names that are known there."""
    yield node, depth, names
    if depth > MAX_DEPTH:
        return
    if isinstance(node, nodes.For):
        names |= {"loop", *(target.name for target in node.find_all(nodes.Name) if target.ctx == "store")}
    for child in node.iter_child_nodes():
        yield from _walk(child, depth + 1, names)


def _may_loop(loop: nodes.For, names: frozenset[str]) -> bool:
    is_plain = isinstance(loop.target, nodes.Name) and not loop.recursive and "loop" not in names
    return is_plain and isinstance(loop.iter, nodes.Name) and loop.iter.name in LOOPED_OVER


def _try_out(template: str) -> list[str]:
    """Fill it with sample data, with and without earlier turns."""
    question, *texts = _SAMPLES
    sources = [PromptSource(number, "doc_x", "Title", text, 1, {"year": 2026}) for number, text in enumerate(texts, start=1)]
    problems = []
    for history in ((), (PromptTurn("user", "Hello?"), PromptTurn("assistant", "Hello."))):
        written = render_template(template, PromptValues(question, "\n\n".join(texts), sources, "English", "en", history))
        problems += [] if question in written else ["does not write the question: it needs the variable {question}"]
        problems += [] if all(text in written for text in texts) else ["does not write the sources: it needs the variable {context}"]
    return problems


def _explain(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    message = str(getattr(error, "message", None) or error)[:200]
    return f"{message} (line {line})" if line else message
