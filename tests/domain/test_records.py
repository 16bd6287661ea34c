"""Records: what is one, and what is said about a line that is none."""

import pytest

from server.domain.datasets import RecordKind
from server.domain.record_forms import parse_record, parse_value
from server.domain.records import MAX_RECORD_BYTES, Record, RecordInvalid, ToolCall, TurnRole


def test_a_chat_record_keeps_its_turns() -> None:
    line = (
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ما هو؟"}, {"role": "assistant", "content": "نعم"}]}'
    )
    record = parse_record(line.encode())
    assert [turn.role for turn in record.turns] == [TurnRole.SYSTEM, TurnRole.USER, TurnRole.ASSISTANT]
    assert record.turns[2].content == "نعم"
    assert not record.is_plain


def test_a_completion_record_is_marked_as_one() -> None:
    record = parse_record(b'{"prompt": "1 + 1 =", "completion": " 2"}')
    assert record.is_plain
    assert [turn.content for turn in record.turns] == ["1 + 1 =", " 2"]


@pytest.mark.parametrize(
    ("line", "contents", "is_plain"),
    [
        (b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}', ["s", "q"], False),
        (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', ["q", "a"], False),
        (b'{"prompt": [{"role": "user", "content": "q"}]}', ["q"], False),
        (b'{"prompt": "Once upon", "completion": "a time"}', ["Once upon"], True),
    ],
)
def test_a_prompt_needs_no_answer(line: bytes, contents: list[str], is_plain: bool) -> None:
    record = parse_record(line, RecordKind.PROMPT)
    assert (record.kind, [turn.content for turn in record.turns], record.is_plain) == (RecordKind.PROMPT, contents, is_plain)
    assert not record.kind.can_be_learnt


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "BAD_ROLE_ORDER"),
        (b'{"messages": [{"role": "system", "content": "s"}]}', "BAD_ROLE_ORDER"),
        (b'{"prompt": " "}', "EMPTY_TEXT"),
        (b'{"completion": "a"}', "EMPTY_MESSAGES"),
    ],
)
def test_what_is_no_prompt_is_told(line: bytes, code: str) -> None:
    with pytest.raises(RecordInvalid) as refusal:
        parse_record(line, RecordKind.PROMPT)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "BROKEN_JSON"), (b"[" * 100_000, "BROKEN_JSON"), (b"[]", "NOT_AN_OBJECT"), (b"{}", "MISSING_FIELD"),
        (b'{"messages": []}', "EMPTY_MESSAGES"), (b'{"messages": "x"}', "EMPTY_MESSAGES"),
        (b'{"messages": [{"role": "user"}]}', "BAD_MESSAGE"), (b'{"messages": [1]}', "BAD_MESSAGE"),
        (b'{"messages": [{"role": "bot", "content": "x"}]}', "UNKNOWN_ROLE"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "EMPTY_TEXT"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "BAD_ROLE_ORDER"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "BAD_ROLE_ORDER"),
        (b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}', "BAD_ROLE_ORDER"),
        (b'{"messages": [{"role": "system", "content": "x"}]}', "BAD_ROLE_ORDER"),
        (b'{"prompt": "x"}', "MISSING_FIELD"), (b'{"prompt": "x", "completion": ""}', "EMPTY_TEXT"),
        (b'{"prompt": 1, "completion": "x"}', "MISSING_FIELD"),
        (b'{"prompt": "\xff", "completion": "x"}', "NOT_UTF8"), (b'{"prompt": "\\ud800", "completion": "x"}', "NOT_UTF8"),
        (b" " * (MAX_RECORD_BYTES + 1), "RECORD_TOO_LONG"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_gets_its_code(line: bytes, code: str) -> None:
    with pytest.raises(RecordInvalid) as refusal:
        parse_record(line)
    assert refusal.value.code == code
    assert refusal.value.to_finding(7).line == 7


def turns_of(record: Record) -> list[tuple[str, str]]:
    return [(turn.role.value, turn.content) for turn in record.turns]


@pytest.mark.parametrize(
    ("value", "kind", "turns"),
    [
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, RecordKind.INSTRUCTION, [("user", "Add\n\n1, 2"), ("assistant", "3")]),
        ({"instruction": "Add", "input": " ", "output": "3"}, RecordKind.INSTRUCTION, [("user", "Add"), ("assistant", "3")]),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            RecordKind.SHAREGPT,
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            RecordKind.COMPLETION,
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]},
            RecordKind.CHAT,
            [("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_every_form_of_conversation_is_recognised(value: object, kind: RecordKind, turns: list[tuple[str, str]]) -> None:
    record = parse_value(value)
    assert (record.kind, turns_of(record), record.is_plain) == (kind, turns, False)


def test_a_text_is_only_a_text() -> None:
    assert parse_value({"text": "The river."}) == Record(RecordKind.TEXT, text="The river.")


def test_the_form_can_be_chosen_against_what_the_fields_show() -> None:
    both = {"text": "t", "prompt": "p", "completion": "c"}
    assert parse_value(both).kind is RecordKind.COMPLETION
    assert parse_value(both, RecordKind.TEXT).text == "t"
    with pytest.raises(RecordInvalid, match="`instruction` and `output`"):
        parse_value(both, RecordKind.INSTRUCTION)


def test_pairs_hold_their_prompt_once() -> None:
    asked, good, bad = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "g"}, {"role": "assistant", "content": "b"})
    for value in (
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"prompt": "q", "chosen": [good], "rejected": [bad]},
        {"prompt": "q", "chosen": [asked, good], "rejected": [asked, bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
    ):
        record = parse_value(value)
        assert turns_of(record) == [("user", "q")]
        assert (record.chosen[0].content, record.rejected[0].content, record.is_plain) == ("g", "b", False)
    plain = parse_value({"prompt": "q", "chosen": "g", "rejected": "b"})
    assert (plain.is_plain, plain.is_pair) == (True, True)
    for chosen, code in (("b", "EQUAL_ANSWERS"), ([], "MISSING_FIELD")):
        with pytest.raises(RecordInvalid) as refusal:
            parse_value({"prompt": "q", "chosen": chosen, "rejected": "b"})
        assert refusal.value.code == code


def call_tool(arguments: object) -> list[object]:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "north", "tool_call_id": "c1"},
        {"role": "assistant", "content": "In the north."},
    ]


def test_tool_calls_and_their_answers_stand_between_two_turns() -> None:
    for arguments in ({"what": "map"}, '{"what": "map"}'):
        record = parse_value({"messages": call_tool(arguments), "tools": [{"type": "function", "function": {"name": "look"}}]})
        assert record.turns[1].tool_calls == (ToolCall("look", '{"what": "map"}', "c1"),)
        assert (record.turns[2].role, record.turns[2].call_id) == (TurnRole.TOOL, "c1")
        assert len(record.tools) == 1
    for messages, code in (
        (call_tool("not json"), "BAD_TOOL_CALL"),
        (call_tool({})[:2], None),
        ([*call_tool({})[:2], *call_tool({})[3:]], "BAD_ROLE_ORDER"),
        ([call_tool({})[0], call_tool({})[2]], "BAD_ROLE_ORDER"),
    ):
        if code is None:
            assert parse_value({"messages": messages}).turns[-1].tool_calls  # a call is an answer
            continue
        with pytest.raises(RecordInvalid) as refusal:
            parse_value({"messages": messages})
        assert refusal.value.code == code


@pytest.mark.parametrize("weight", [-1, float("nan"), "1", True, 1e9])
def test_a_senseless_weight_is_refused(weight: object) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": weight}]
    with pytest.raises(RecordInvalid) as refusal:
        parse_value({"messages": messages})
    assert refusal.value.code == "BAD_WEIGHT"


def test_a_weight_is_kept() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]
    assert [turn.weight for turn in parse_value({"messages": messages}).turns] == [1.0, 0.5]
