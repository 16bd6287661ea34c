"""Records: what is one, and what is said about a line that is none."""

import pytest

from server.domain.generation import Role
from server.domain.records import MAX_RECORD_BYTES, RecordInvalid, parse_record


def test_a_chat_record_keeps_its_turns() -> None:
    line = (
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ما هو؟"}, {"role": "assistant", "content": "نعم"}]}'
    )
    record = parse_record(line.encode())
    assert [message.role for message in record.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT]
    assert record.messages[2].content == "نعم"
    assert not record.is_completion


def test_a_completion_record_is_marked_as_one() -> None:
    record = parse_record(b'{"prompt": "1 + 1 =", "completion": " 2"}')
    assert record.is_completion
    assert [message.content for message in record.messages] == ["1 + 1 =", " 2"]


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
