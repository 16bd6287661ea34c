"""The one preparation of records: tokenizer and rules to the sequences that are trained, and what was found. Training and preview use it.

Many records at once are rendered one by one and encoded together, on all cores.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from server.basemodels.encoding import MarkedText, Rendered
from server.basemodels.errors import RenderingRefused
from server.basemodels.rendering import SYSTEM_TURN_DROPPED, TOOLS_DROPPED, Renderer
from server.datafiles.reading import NumberedRecord
from server.domain.datasets import RecordKind
from server.domain.findings import Finding, Severity
from server.domain.records import Record, RecordInvalid, Turn, TurnRole
from server.domain.specs import LossOn, OverlongPolicy

# More tokens per word than this: the tokenizer hardly knows the language. English has 1.3 and Arabic 2.2 with Llama 3's, Arabic
# 6.1 with SmolLM2's.
MAX_TOKENS_PER_WORD = 4.0
MIN_MEASURED_WORDS = 5
# Scripts without spaces count by character.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
MAX_KEPT_HEAD_SHARE = 0.25  # of the longest sequence: a system turn that takes more is cut like the rest

NOTES = {
    SYSTEM_TURN_DROPPED: "The chat template of the base model leaves the system turn out: it is neither read nor learnt.",
    TOOLS_DROPPED: "The chat template of the base model leaves the tools out: the model does not see what it may call.",
}


@dataclass(frozen=True, slots=True)
class Rules:
    """How records become sequences. `needs_pairs`: the objective learns from preference pairs."""

    max_tokens: int
    overlong_policy: OverlongPolicy
    loss_on: LossOn
    needs_pairs: bool


@dataclass(frozen=True, slots=True)
class PreparedSequence:
    """What is trained as one: token ids with one weight each, 0 where untrained. The first token is never trained.

    `answer_start` is where the last answer begins, of a pair the whole answer: what no cut may touch.
    """

    name: str
    token_ids: Sequence[int]
    weights: Sequence[float]
    answer_start: int = 0


@dataclass(frozen=True, slots=True)
class PreparedRecord:
    """A record's sequences (none: it is unusable or dropped) and findings. `lengths` are those before any policy.

    `is_invalid`: it is no record at all, as its upload has counted it.
    """

    number: int
    line: int
    sequences: tuple[PreparedSequence, ...] = ()
    findings: tuple[Finding, ...] = ()
    lengths: tuple[int, ...] = ()
    is_invalid: bool = False
    is_dropped: bool = False
    is_cut: bool = False


class Preparation:
    """Prepares records for one tokenizer under one set of rules."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> None:
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer)
        self._rules = rules

    @property
    def sequences_per_record(self) -> int:
        """Two of pairs, else one."""
        return 2 if self._rules.needs_pairs else 1

    def prepare(self, records: Sequence[NumberedRecord]) -> list[PreparedRecord]:
        """Prepare records, in their order."""
        laid_out = [self._lay_out(numbered) for numbered in records]
        texts = [text for result in laid_out if not isinstance(result, PreparedRecord) for text in result]
        encoded = iter(zip(texts, self._renderer.encoder.encode_all(texts), strict=True)) if texts else iter(())
        prepared = []
        for numbered, result in zip(records, laid_out, strict=True):
            if isinstance(result, PreparedRecord):
                prepared.append(result)
            else:
                prepared.append(self._finish(numbered, [next(encoded) for _ in result]))
        return prepared

    def _lay_out(self, numbered: NumberedRecord) -> PreparedRecord | list[MarkedText]:
        """Give the record's texts, one or two, or what prevents that."""
        record = numbered.record
        if isinstance(record, RecordInvalid):
            return replace(_refuse(numbered, record.code, str(record)), is_invalid=True)
        if not record.kind.can_be_learnt:
            what = "query to evaluate retrieval by" if record.kind is RecordKind.RETRIEVAL else "prompt without an answer"
            return _refuse(numbered, "WRONG_RECORD_KIND", f"The record is a {what}: nothing can be learnt from it.")
        if record.is_pair != self._rules.needs_pairs:
            wanted = "has no chosen and rejected answer, which DPO and ORPO learn from" if self._rules.needs_pairs else (
                "is a preference pair, which only the objectives DPO and ORPO learn from"
            )  # fmt: skip
            return _refuse(numbered, "WRONG_RECORD_KIND", f"The record {wanted}.")
        try:
            return self._write_texts(record)
        except RenderingRefused as error:
            return _refuse(numbered, error.reason, str(error))

    def _write_texts(self, record: Record) -> list[MarkedText]:
        renderer = self._renderer
        if record.kind is RecordKind.TEXT:
            return [renderer.lay_out_plain("", record.text)]
        if record.is_pair and record.is_plain:
            return [renderer.lay_out_plain(record.turns[0].content, answer[0].content) for answer in (record.chosen, record.rejected)]
        if record.is_pair:
            return [self._write_answer(record, answer) for answer in (record.chosen, record.rejected)]
        if record.is_plain:
            prompt, completion = record.turns
            return [renderer.lay_out_plain(prompt.content, completion.content, completion.weight)]
        answers = [place for place, turn in enumerate(record.turns) if turn.role is TurnRole.ASSISTANT]
        trained = frozenset(answers[-1:] if self._rules.loss_on is LossOn.COMPLETION else answers)
        return [renderer.lay_out(record.turns, tools=record.tools, trained=trained)]

    def _write_answer(self, record: Record, answer: tuple[Turn, ...]) -> MarkedText:
        turns = (*record.turns, *answer)
        return self._renderer.lay_out(turns, tools=record.tools, trained=frozenset(range(len(record.turns), len(turns))))

    def _finish(self, numbered: NumberedRecord, encoded: Sequence[tuple[MarkedText, Rendered | RenderingRefused]]) -> PreparedRecord:
        assert isinstance(numbered.record, Record)
        names = ("chosen", "rejected") if len(encoded) == 2 else ("record",)
        sequences: list[PreparedSequence] = []
        codes: dict[str, str] = {}
        for name, (text, rendered) in zip(names, encoded, strict=True):
            if isinstance(rendered, RenderingRefused):
                return _refuse(numbered, rendered.reason, str(rendered))
            codes |= {code: NOTES[code] for code in text.notes} | self._judge(text, rendered)
            weights = self._weigh(numbered.record, rendered)
            sequences.append(PreparedSequence(name, rendered.token_ids, weights, _find_answer(numbered.record, rendered)))
        findings = tuple(Finding(numbered.line, code, message, Severity.WARNING) for code, message in codes.items())
        prepared = PreparedRecord(
            numbered.number, numbered.line, tuple(sequences), findings, tuple(len(sequence.token_ids) for sequence in sequences)
        )
        if not all(any(sequence.weights) for sequence in sequences):
            message = "No token of the record is trained: every answer has the weight 0, or is empty."
            return replace(prepared, sequences=(), findings=(*findings, Finding(numbered.line, "NO_TRAINABLE_TOKEN", message)))
        if max(prepared.lengths) <= self._rules.max_tokens:
            return prepared
        return self._shorten(prepared, numbered.record, encoded[0][0])

    def _weigh(self, record: Record, rendered: Rendered) -> list[float]:
        weights = rendered.weights
        if self._rules.loss_on is LossOn.ALL and not record.is_pair:
            answers = {place for span in rendered.spans for place in range(span.start, span.end)}
            weights = [weight if place in answers else 1.0 for place, weight in enumerate(weights)]
        if weights:
            weights[0] = 0.0  # nothing stands before it to predict it from
        return weights

    def _judge(self, text: MarkedText, rendered: Rendered) -> dict[str, str]:
        """Find what a tokenizer does badly with a text."""
        found = {}
        if rendered.had_double_bos:
            found["DOUBLE_BOS"] = "The text begins with the beginning-of-sequence token that the tokenizer adds anyway; one is taken out."
        if not text.text.isascii():  # what the tokenizers in use know best costs nothing
            words, tokens = _count_words(text, rendered)
            if words >= MIN_MEASURED_WORDS and tokens > MAX_TOKENS_PER_WORD * words:
                share = tokens / words
                found["MANY_TOKENS_PER_WORD"] = (
                    f"The tokenizer splits words into {share:.1f} tokens each: it hardly knows this language, so training is slow and dear."
                )
        return found

    def _shorten(self, prepared: PreparedRecord, record: Record, text: MarkedText) -> PreparedRecord:
        """Do with a record that is too long what the policy says."""
        rules = self._rules
        size = f"The record has {max(prepared.lengths):,} tokens, more than {rules.max_tokens:,}"
        is_text = record.kind is RecordKind.TEXT
        match rules.overlong_policy:
            case OverlongPolicy.REJECT:
                return _leave_out(prepared, "OVERLONG", f"{size}.", Severity.ERROR)
            case OverlongPolicy.DROP:
                return _leave_out(prepared, "OVERLONG", f"{size}; it is left out.", Severity.WARNING)
            case OverlongPolicy.SPLIT if is_text:
                parts = tuple(_split(prepared.sequences[0], rules.max_tokens))
                return _change(prepared, parts, f"{size}; it is split into {len(parts)} parts.")
            case OverlongPolicy.SPLIT:
                return _leave_out(prepared, "SPLIT_NEEDS_TEXT", f"{size}, and only plain texts can be split.", Severity.ERROR)
            case OverlongPolicy.TRUNCATE_PROMPT_LEFT:
                head = self._count_head(prepared, record, text)
                cut = _cut_prompts(prepared.sequences, head, rules.max_tokens)
                if cut is None:
                    return _leave_out(prepared, "ANSWER_TOO_LONG", f"{size}, with its answer alone; it is left out.", Severity.WARNING)
                return _change(prepared, cut, f"{size}; the oldest tokens of its prompt are cut off.")

    def _count_head(self, prepared: PreparedRecord, record: Record, text: MarkedText) -> int:
        """Count the tokens at the beginning that stay when a prompt is cut: the BOS, and a system turn that is not too long."""
        ids = prepared.sequences[0].token_ids
        head = 1 if ids[0] == self._tokenizer.bos_token_id else 0
        if record.is_plain or not record.turns or record.turns[0].role is not TurnRole.SYSTEM:
            return head
        try:
            alone = self._renderer.apply_template(record.turns[:1], record.tools)
        except RenderingRefused:
            return head  # this template knows no system turn by itself
        system_ids = self._renderer.encoder.plain_ids(alone)
        fits = len(system_ids) <= MAX_KEPT_HEAD_SHARE * self._rules.max_tokens
        return len(system_ids) if fits and text.text.startswith(alone) and list(ids[: len(system_ids)]) == system_ids else head


def _count_words(text: MarkedText, rendered: Rendered) -> tuple[int, int]:
    """Count words and tokens of the answers, which no markup of a template thins out; of the whole text where those say too little."""
    words = sum(len(_WORD.findall(text.text, turn.start, turn.end)) for turn in text.turns)
    if words >= MIN_MEASURED_WORDS:
        return words, sum(span.end - span.start for span in rendered.spans)
    return len(_WORD.findall(text.text)), len(rendered.token_ids)


def _split(sequence: PreparedSequence, max_tokens: int) -> list[PreparedSequence]:
    """Cut a text into parts. Each begins with the last token of the one before, so that every token but the first is trained once."""
    parts: list[PreparedSequence] = []
    for start in range(0, len(sequence.token_ids) - 1, max_tokens - 1):
        part = slice(start, start + max_tokens)
        weights = [0.0, *sequence.weights[part][1:]]
        parts.append(PreparedSequence(f"part {len(parts) + 1}", sequence.token_ids[part], weights))
    return parts


def _cut_prompts(sequences: Sequence[PreparedSequence], head: int, max_tokens: int) -> tuple[PreparedSequence, ...] | None:
    """Cut the same tokens behind the head out of all sequences of a record; None where that would cut into an answer."""
    excess = max(len(sequence.token_ids) for sequence in sequences) - max_tokens
    for kept in dict.fromkeys((head, min(head, 1), 0)):  # the system turn gives way before the record is lost
        if all(sequence.answer_start >= max(1, kept) + excess for sequence in sequences):
            return tuple(_cut(sequence, kept, excess) for sequence in sequences)
    return None


def _find_answer(record: Record, rendered: Rendered) -> int:
    trained = [span.start for span in rendered.spans if span.weight]
    if not trained:
        return 0
    return trained[0] if record.is_pair else trained[-1]


def _cut(sequence: PreparedSequence, head: int, count: int) -> PreparedSequence:
    ids, weights = sequence.token_ids, list(sequence.weights)
    place = head + count
    # What is left of an earlier answer that lost its beginning is read, not learnt.
    while 0 < place < sequence.answer_start and weights[place - 1] and weights[place]:
        place += 1
    weights[head + count : place] = [0.0] * (place - head - count)
    kept = [*weights[:head], *weights[head + count :]]
    kept[0] = 0.0
    return PreparedSequence(sequence.name, [*ids[:head], *ids[head + count :]], kept, sequence.answer_start - count)


def _refuse(numbered: NumberedRecord, code: str, message: str) -> PreparedRecord:
    return PreparedRecord(numbered.number, numbered.line, findings=(Finding(numbered.line, code, message),))


def _leave_out(prepared: PreparedRecord, code: str, message: str, severity: Severity) -> PreparedRecord:
    found = Finding(prepared.line, code, message, severity)
    return replace(prepared, sequences=(), findings=(*prepared.findings, found), is_dropped=severity is Severity.WARNING)


def _change(prepared: PreparedRecord, sequences: tuple[PreparedSequence, ...], message: str) -> PreparedRecord:
    found = Finding(prepared.line, "OVERLONG", message, Severity.WARNING)
    return replace(prepared, sequences=sequences, findings=(*prepared.findings, found), is_cut=True)
