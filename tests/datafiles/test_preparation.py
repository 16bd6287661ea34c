"""Preparation: which tokens are trained with which weight, what is cut and what is never cut, and that a preview shows just that."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.basemodels.encoding import Encoder, MarkedText
from server.basemodels.loading import load_tokenizer
from server.basemodels.rendering import Renderer, find_stop_token_ids, render
from server.datafiles.preparation import Preparation, PreparedRecord, Rules
from server.datafiles.previewing import Previewer
from server.datafiles.reading import NumberedRecord
from server.diskfiles import hash_file
from server.domain.datasets import DatasetFormat, RecordKind
from server.domain.findings import Severity
from server.domain.generation import ChatMessage, Role
from server.domain.orders import DatasetFile, FineTuneOrder
from server.domain.previews import PreviewOrder
from server.domain.record_forms import parse_value
from server.domain.specs import FineTuneSpec, LossOn, Objective, OverlongPolicy
from server.domain.techniques import LoraTechnique
from server.training.data import read_training_data
from tests.tiny_models import FAMILIES, build_tiny_causal_model
from tests.training.building import make_parameters, write_records

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who keeps the maps?"},
        {"role": "assistant", "content": "The keeper."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "Every day."},
    ]
}
TRICKY = ("\n\n  Every day.", " x", "<|im_end|>", "نعم\u200f", "a\tb\n", "é" * 30, "</s> <s>", "### User:\n", "🗺️ map", "1\n\n\n2")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    root = tmp_path_factory.mktemp("models")
    return {(name, chat): build_tiny_causal_model(root / f"{name}{chat}", name, chat) for name in FAMILIES for chat in (True, False)}


@pytest.fixture(scope="module")
def tokenizer(directories: dict[tuple[str, bool], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(directories["llama", True])


def prepare(tokenizer: PreTrainedTokenizerBase, *values: object, **rules: object) -> list[PreparedRecord]:
    chosen = {"max_tokens": 512, "overlong_policy": OverlongPolicy.REJECT, "loss_on": LossOn.ASSISTANT, "needs_pairs": False, **rules}
    numbered = [NumberedRecord(number, number, parse_value(value)) for number, value in enumerate(values, start=1)]
    return Preparation(tokenizer, Rules(**chosen)).prepare(numbered)  # type: ignore[arg-type]  # names are checked by the call


def show_trained(tokenizer: PreTrainedTokenizerBase, record: PreparedRecord) -> str:
    (sequence,) = record.sequences
    kept = [token if weight else None for token, weight in zip(sequence.token_ids, sequence.weights, strict=True)]
    return "".join("|" if token is None else str(tokenizer.decode([token])) for token in kept).strip("|").replace("|" * 2, "|")


def codes(record: PreparedRecord) -> list[tuple[str, Severity]]:
    return [(finding.code, finding.severity) for finding in record.findings]


@pytest.mark.parametrize(
    ("loss_on", "first", "last"), [(LossOn.ASSISTANT, True, True), (LossOn.COMPLETION, False, True), (LossOn.ALL, True, True)]
)
def test_the_choice_of_trained_tokens_is_followed(tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, first: bool, last: bool) -> None:
    trained = show_trained(tokenizer, prepare(tokenizer, CHAT, loss_on=loss_on)[0])
    assert ("The keeper.<|im_end|>" in trained, "Every day.<|im_end|>" in trained) == (first, last)
    assert ("Who keeps" in trained) == (loss_on is LossOn.ALL)


def test_weights_of_messages_are_those_of_their_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [dict(message) for message in CHAT["messages"]]
    messages[2]["weight"], messages[4]["weight"] = 0.5, 2  # type: ignore[assignment]  # a number among texts
    (sequence,) = prepare(tokenizer, {"messages": messages})[0].sequences
    assert sorted(set(sequence.weights)) == [0.0, 0.5, 2.0]
    messages[2]["weight"] = 0  # type: ignore[assignment]
    assert "The keeper" not in show_trained(tokenizer, prepare(tokenizer, {"messages": messages})[0])


def test_a_text_is_trained_whole_and_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    (sequence,) = prepare(tokenizer, {"text": "The river town."})[0].sequences
    assert sequence.token_ids[-1] == tokenizer.eos_token_id
    assert list(sequence.weights) == [0.0] + [1.0] * (len(sequence.token_ids) - 1)


def test_every_trained_answer_ends_in_a_token_that_serving_stops_at(directories: dict[tuple[str, bool], Path]) -> None:
    for directory in directories.values():
        tokenizer = load_tokenizer(directory)
        (sequence,) = prepare(tokenizer, {"instruction": "When?", "output": "Every day."})[0].sequences
        last = max(place for place, weight in enumerate(sequence.weights) if weight)
        assert sequence.token_ids[last] in find_stop_token_ids(tokenizer)


@pytest.mark.parametrize("text", TRICKY)
def test_encoding_in_batches_gives_the_tokens_that_encoding_by_parts_gives(
    directories: dict[tuple[str, bool], Path], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands before an answer must be what serving feeds; the fast way must never differ from the plain one."""
    for directory in directories.values():
        tokenizer = load_tokenizer(directory)
        turns = [
            ChatMessage(Role.USER, text),
            ChatMessage(Role.ASSISTANT, text),
            ChatMessage(Role.USER, text),
            ChatMessage(Role.ASSISTANT, "x"),
        ]
        marked = Renderer(tokenizer).lay_out(turns)
        fast = Encoder(tokenizer).encode(marked)
        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "_find_spans", lambda self, marked, _: self._encode_by_parts(marked))
            slow = Encoder(tokenizer).encode(marked)
        assert (fast.token_ids, fast.spans) == (slow.token_ids, slow.spans)
        for turn, span in zip((1, 3), fast.spans, strict=True):
            assert render(tokenizer, turns[:turn], add_generation_prompt=True).token_ids == fast.token_ids[: span.start]


def test_a_prompt_that_alone_has_other_tokens_is_kept_as_it_is_served() -> None:
    """As with Llama 3: two line breaks are one token at the end of a text, but two before a word."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(["a\n\n"] * 9, trainers.BpeTrainer(vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")  # type: ignore[no-untyped-call]  # noqa: S106
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<s>' + message.role + '\n\n' + message.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n\n' }}{% endif %}"
    )
    turns = [ChatMessage(Role.USER, "x"), ChatMessage(Role.ASSISTANT, "y")]
    rendered = render(tokenizer, turns)
    prompt = render(tokenizer, turns[:1], add_generation_prompt=True).token_ids
    assert rendered.token_ids[: rendered.spans[0].start] == prompt
    whole = list(tokenizer("<s>user\n\nx</s><s>assistant\n\ny</s>")["input_ids"])
    assert whole[: len(prompt)] != prompt  # or this would show nothing


def test_the_fast_way_is_taken_where_the_template_has_special_tokens(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Encoder, marked: MarkedText) -> None:
        raise AssertionError(marked.text)

    monkeypatch.setattr(Encoder, "_encode_by_parts", fail)
    assert prepare(tokenizer, CHAT)[0].sequences


def make_chat(question: str, answer: str, system: str = "Be brief.") -> dict[str, object]:
    turns = [("system", system), ("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_a_prompt_is_cut_from_its_oldest_tokens_and_the_answer_stays_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    rules = {"max_tokens": 80, "overlong_policy": OverlongPolicy.TRUNCATE_PROMPT_LEFT}
    (whole,) = prepare(tokenizer, make_chat("", "The keeper.") | make_chat("old " + "map " * 60 + "new", "The keeper."))[0].sequences
    record = prepare(tokenizer, make_chat("old " + "map " * 60 + "new", "The keeper."), **rules)[0]
    (sequence,) = record.sequences
    text = str(tokenizer.decode(list(sequence.token_ids)))
    assert len(sequence.token_ids) == 80
    assert (record.is_cut, codes(record)) == (True, [("OVERLONG", Severity.WARNING)])
    assert "old" not in text
    assert "map new" in text
    assert show_trained(tokenizer, record) == "The keeper.<|im_end|>"
    assert list(sequence.token_ids[-20:]) == list(whole.token_ids[-20:])


def test_a_short_system_turn_stays_when_a_prompt_is_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    rules = {"max_tokens": 100, "overlong_policy": OverlongPolicy.TRUNCATE_PROMPT_LEFT}
    short = prepare(tokenizer, make_chat("map " * 100, "Yes.", system="Hi"), **rules)[0]
    long = prepare(tokenizer, make_chat("map " * 100, "Yes.", system="Hi " * 60), **rules)[0]
    assert "Hi<|im_end|>" in str(tokenizer.decode(list(short.sequences[0].token_ids)))
    assert "Hi" not in str(tokenizer.decode(list(long.sequences[0].token_ids)))
    assert long.sequences[0].token_ids[0] == tokenizer.bos_token_id


def test_an_answer_that_alone_is_too_long_is_left_out_and_named(tokenizer: PreTrainedTokenizerBase) -> None:
    record = prepare(tokenizer, make_chat("q", "map " * 100), max_tokens=80, overlong_policy=OverlongPolicy.TRUNCATE_PROMPT_LEFT)[0]
    assert (record.sequences, record.is_dropped, codes(record)) == ((), True, [("ANSWER_TOO_LONG", Severity.WARNING)])


def test_what_is_left_of_an_earlier_answer_is_not_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "q"), ("assistant", "river " * 60), ("user", "and?"), ("assistant", "Every day.")]
    value = {"messages": [{"role": role, "content": content} for role, content in turns]}
    record = prepare(tokenizer, value, max_tokens=60, overlong_policy=OverlongPolicy.TRUNCATE_PROMPT_LEFT)[0]
    assert "river" in str(tokenizer.decode(list(record.sequences[0].token_ids)))
    assert show_trained(tokenizer, record) == "Every day.<|im_end|>"


def test_both_answers_of_a_pair_lose_the_same_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    pair = {"prompt": "map " * 80, "chosen": "Yes, it is the keeper.", "rejected": "No."}
    chosen, rejected = prepare(tokenizer, pair, max_tokens=60, overlong_policy=OverlongPolicy.TRUNCATE_PROMPT_LEFT, needs_pairs=True)[
        0
    ].sequences
    assert (chosen.name, rejected.name, len(chosen.token_ids)) == ("chosen", "rejected", 60)
    starts = [next(place for place, weight in enumerate(sequence.weights) if weight) for sequence in (chosen, rejected)]
    assert starts[0] == starts[1]
    assert list(chosen.token_ids[: starts[0]]) == list(rejected.token_ids[: starts[1]])


def test_a_text_is_split_so_that_every_token_is_trained_once(tokenizer: PreTrainedTokenizerBase) -> None:
    value = {"text": "The river town keeps its maps. " * 20}
    (whole,) = prepare(tokenizer, value)[0].sequences
    record = prepare(tokenizer, value, max_tokens=50, overlong_policy=OverlongPolicy.SPLIT)[0]
    assert [part.name for part in record.sequences[:2]] == ["part 1", "part 2"]
    assert all(len(part.token_ids) <= 50 for part in record.sequences)
    trained = [token for part in record.sequences for token, weight in zip(part.token_ids, part.weights, strict=True) if weight]
    assert trained == list(whole.token_ids[1:])
    refused = prepare(tokenizer, CHAT, max_tokens=20, overlong_policy=OverlongPolicy.SPLIT)[0]
    assert (refused.sequences, codes(refused)) == ((), [("SPLIT_NEEDS_TEXT", Severity.ERROR)])


def test_what_the_template_and_the_tokenizer_do_badly_is_told(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_tiny_causal_model(tmp_path / "m"))
    tokenizer.chat_template = (
        "{% for message in messages if message['role'] != 'system' %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "look_up"}}
    record = prepare(tokenizer, {**CHAT, "tools": [tool]})[0]
    assert codes(record) == [("SYSTEM_TURN_DROPPED", Severity.WARNING), ("TOOLS_DROPPED", Severity.WARNING)]
    chinese = prepare(tokenizer, {"text": "ሰላም ለሁሉም ሰው እንዴት ነህ ዛሬ ጠዋት"})[0]
    assert codes(chinese) == [("MANY_TOKENS_PER_WORD", Severity.WARNING)]
    assert codes(prepare(tokenizer, {"text": "Who keeps the maps? The keeper — every day."})[0]) == []
    # What a template writes around a short answer in English does not hide how the answer itself is split.
    chatty = "{{ 'You are a helpful assistant in a town at the river. ' * 9 }}" + tokenizer.chat_template
    tokenizer.chat_template = chatty
    answer = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ሰላም ለሁሉም ሰው እንዴት ነህ ዛሬ ጠዋት"}]}
    assert codes(prepare(tokenizer, answer)[0]) == [("MANY_TOKENS_PER_WORD", Severity.WARNING)]


def test_a_second_bos_is_taken_out_and_told(directories: dict[tuple[str, bool], Path]) -> None:
    tokenizer = load_tokenizer(directories["mistral", True])
    record = prepare(tokenizer, {"text": "<s>The river."})[0]
    assert codes(record) == [("DOUBLE_BOS", Severity.WARNING)]
    assert list(record.sequences[0].token_ids).count(tokenizer.bos_token_id) == 1


def test_tool_calls_are_trained_and_refused_where_the_template_drops_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_tiny_causal_model(tmp_path / "m"))
    call = {"function": {"name": "look_up", "arguments": {"what": "map"}}}
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "tool_calls": [call]}]
    assert codes(prepare(tokenizer, {"messages": turns})[0]) == [("TEMPLATE_REWRITES_TURNS", Severity.ERROR)]
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert show_trained(tokenizer, prepare(tokenizer, {"messages": turns})[0]) == 'look_up{"what": "map"}<|im_end|>'


RECORDS: Sequence[object] = [
    CHAT, {"prompt": "1 + 1 =", "completion": " 2"}, {"text": "map " * 200}, {"broken": 1}, {"instruction": "q", "output": "نعم"},
    make_chat("old " + "map " * 90, "The keeper."),
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("policy", [OverlongPolicy.DROP, OverlongPolicy.TRUNCATE_PROMPT_LEFT])
@pytest.mark.parametrize("loss_on", list(LossOn))
def test_what_is_previewed_is_what_is_trained(
    directories: dict[tuple[str, bool], Path], tmp_path: Path, family: str, policy: OverlongPolicy, loss_on: LossOn
) -> None:
    path = write_records(tmp_path / "x", RECORDS)
    file = DatasetFile("x", hash_file(path), DatasetFormat.JSONL, RecordKind.MIXED, 5)
    directory = directories[family, family == "llama"]
    settings = replace(make_parameters(), max_sequence_tokens=100, overlong_policy=policy, loss_on=loss_on, objective=Objective.SUPERVISED)
    spec = FineTuneSpec("base", "ds", file.sha256, LoraTechnique(), settings)
    order = FineTuneOrder("job", 1, spec, file, "j", "m")
    trained = read_training_data(order, lambda _: path, None, load_tokenizer(directory), 512, lambda _: None, lambda: None).train
    asked = PreviewOrder("base", file, tuple(range(1, 7)), 100, policy, loss_on, needs_pairs=False, max_tokens_shown=8192)
    shown = Previewer(lambda _: directory, lambda _: path).preview(asked)
    sequences = [sequence for record in shown.records for sequence in record.sequences]
    assert [record.record for record in shown.records] == [1, 2, 3, 4, 5, 6]
    assert len(sequences) == len(trained)
    for index, sequence in enumerate(sequences):
        assert [token.token_id for token in sequence.tokens] == trained.token_ids(index).tolist()
        assert [token.weight for token in sequence.tokens] == trained.weights(index).tolist()
        assert (sequence.token_count, sequence.trained_token_count) == (trained.length(index), int(trained.trained_mask(index).sum()))


def test_a_preview_shows_the_asked_records_and_as_many_tokens_as_asked(directories: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    path = write_records(tmp_path / "x", RECORDS)
    file = DatasetFile("x", "", DatasetFormat.JSONL, RecordKind.MIXED, 5)
    order = PreviewOrder("base", file, (2, 4), 100, OverlongPolicy.REJECT, LossOn.ASSISTANT, needs_pairs=False, max_tokens_shown=3)
    shown = Previewer(lambda _: directories["llama", True], lambda _: path).preview(order)
    good, bad = shown.records
    assert (good.record, [token.text for token in good.sequences[0].tokens], good.sequences[0].token_count > 3) == (
        2,
        ["1", " ", "+"],
        True,
    )
    assert (bad.record, bad.sequences, [finding.code for finding in bad.findings]) == (4, (), ["MISSING_FIELD"])
