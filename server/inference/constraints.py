"""Output in a given form: which tokens may come next so that the text keeps to a JSON schema or a regular expression.

The work is llguidance's: its parser walks the grammar with the tokenizer's own byte strings and gives a mask over the vocabulary.
"""

import json
import threading
from collections.abc import Set as AbstractSet

import llguidance.hf
import numpy
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import PreTrainedTokenizerBase

from server.domain.errors import InvalidInput, Unimplemented
from server.domain.generation import OutputConstraint

FIELD = "parameters.constraint"
# Between the parts of JSON. Without a bound a small model may write line breaks for ever, which every schema would allow.
WHITESPACE = r"[ \n]{1,12}"
MAX_SHOWN_CHARACTERS = 300  # of what the library says about a grammar


class Form:
    """One request's place in its grammar. Not shared, and not thread-safe. `has_failed`: it cannot be followed any further."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.has_failed = False

    def mask(self, scores: torch.Tensor) -> None:
        """Set the scores [vocabulary] of tokens that would leave the form to -inf, in place. Over the parser's limits it fails instead."""
        bits = numpy.unpackbits(numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8), bitorder="little")
        known = min(len(bits), scores.shape[0])
        if self._matcher.is_error() or not bits[:known].any():
            self.has_failed = True
            return
        scores[:known].masked_fill_(torch.from_numpy(bits[:known] == 0).to(scores.device), float("-inf"))
        scores[known:] = float("-inf")

    def advance(self, token_id: int) -> None:
        """Go on by a token that the mask allowed."""
        self._matcher.consume_token(token_id)


class FormReader:
    """Makes forms for one tokenizer whose answers end at `stop_ids`. What is costly is done once, at the first constraint."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: AbstractSet[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, sorted(stop_ids)
        self._lock = threading.Lock()
        self._known: LLTokenizer | None = None

    def read(self, constraint: OutputConstraint) -> Form:
        """Compile a constraint. Blocking, takes up to a second the first time. Raises InvalidInput for what is none."""
        matcher = LLMatcher(self._prepare(), _write_grammar(constraint), log_level=0)
        if matcher.is_error():
            raise _refuse(constraint, matcher.get_error())
        return Form(matcher)

    def _prepare(self) -> LLTokenizer:
        with self._lock:
            if self._known is None:
                try:
                    self._known = llguidance.hf.from_tokenizer(self._tokenizer, eos_token=self._stop_ids)  # type: ignore[arg-type]
                except ValueError as error:
                    raise Unimplemented("This model's tokenizer cannot be held to a form.", reason="CONSTRAINT_NOT_SUPPORTED") from error
            return self._known


def _write_grammar(constraint: OutputConstraint) -> str:
    if constraint.regex:
        return LLMatcher.grammar_from_regex(constraint.regex)
    try:
        schema = json.loads(constraint.json_schema)
        if isinstance(schema, dict):
            schema = {"x-guidance": {"whitespace_pattern": WHITESPACE}, **schema}
        return LLMatcher.grammar_from_json_schema(json.dumps(schema))
    except (ValueError, RecursionError) as error:
        raise _refuse(constraint, str(error)) from error


def _refuse(constraint: OutputConstraint, why: str) -> InvalidInput:
    name = "regex" if constraint.regex else "json_schema"
    lines = [line.strip() for line in why.splitlines() if line.strip()]
    return InvalidInput.field(f"{FIELD}.{name}", f"cannot be followed: {' '.join(lines)[:MAX_SHOWN_CHARACTERS]}", "CONSTRAINT_INVALID")
