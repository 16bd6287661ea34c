"""Training records: one line of a dataset to a conversation, or to the finding that says what is wrong with it.

Upload and training read records through this one function: what was accepted is what is trained.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from server.domain.findings import Finding
from server.domain.generation import ChatMessage, Role

MAX_RECORD_BYTES = 4 << 20  # a longer line is no training record; bounds the memory of a reader


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation to learn from. `is_completion` records are continued as they are, without a chat template."""

    messages: tuple[ChatMessage, ...]
    is_completion: bool = False


class RecordInvalid(ValueError):
    """A line is no record: `code` is stable, the message is for a person."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def to_finding(self, line: int) -> Finding:
        """Name the line (from 1) that this was found on."""
        return Finding(line, self.code, str(self))


def parse_record(line: bytes) -> Record:
    """Read one JSONL line. Raises RecordInvalid."""
    if len(line) > MAX_RECORD_BYTES:
        raise RecordInvalid("RECORD_TOO_LONG", f"The record has more than {MAX_RECORD_BYTES >> 20} MiB.")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise RecordInvalid("NOT_UTF8", "The line is not UTF-8 text.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        detail = f" ({error.msg} at character {error.colno})" if isinstance(error, json.JSONDecodeError) else " (nested too deep)"
        raise RecordInvalid("BROKEN_JSON", f"The line is not JSON{detail}.") from None
    if not isinstance(value, dict):
        raise RecordInvalid("NOT_AN_OBJECT", "The line is JSON, but not an object with `messages`, or `prompt` and `completion`.")
    if "messages" in value:
        return _parse_chat(value)
    if "prompt" in value or "completion" in value:
        return _parse_completion(value)
    raise RecordInvalid("MISSING_FIELD", "The record has neither `messages` nor `prompt` and `completion`.")


def _parse_chat(value: Mapping[str, object]) -> Record:
    raw = value["messages"]
    if not isinstance(raw, list) or not raw:
        raise RecordInvalid("EMPTY_MESSAGES", "`messages` must be a list with at least one user and one assistant turn.")
    messages = tuple(_parse_message(item, place) for place, item in enumerate(raw))
    check_turns(messages)
    if messages[-1].role is not Role.ASSISTANT:
        raise RecordInvalid("BAD_ROLE_ORDER", "The last message must be the assistant's.")
    return Record(messages)


def _parse_message(item: object, place: int) -> ChatMessage:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str) or not isinstance(item.get("role"), str):
        raise RecordInvalid("BAD_MESSAGE", f"messages[{place}] must be an object with the texts `role` and `content`.")
    if item["role"] not in {role.value for role in Role}:
        raise RecordInvalid("UNKNOWN_ROLE", f"messages[{place}].role is {item['role'][:40]!r}; it must be system, user or assistant.")
    content = _text(item["content"], f"messages[{place}].content")
    return ChatMessage(Role(item["role"]), content)


def _text(content: str, name: str) -> str:
    if not content.strip():
        raise RecordInvalid("EMPTY_TEXT", f"{name} is empty.")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise RecordInvalid("NOT_UTF8", f"{name} has half of a surrogate pair, which is no text.")
    return content


def check_turns(messages: tuple[ChatMessage, ...]) -> None:
    """Demand an optional system turn first, then user and assistant in turn. Raises RecordInvalid."""
    turns = messages[1:] if messages and messages[0].role is Role.SYSTEM else messages
    for place, message in enumerate(turns):
        expected = Role.USER if place % 2 == 0 else Role.ASSISTANT
        if message.role is not expected:
            number = place + len(messages) - len(turns)
            raise RecordInvalid("BAD_ROLE_ORDER", f"messages[{number}] is the {message.role.value}'s where the {expected.value}'s is due.")
    if not turns:
        raise RecordInvalid("BAD_ROLE_ORDER", "There is no user turn.")


def _parse_completion(value: Mapping[str, object]) -> Record:
    prompt, completion = value.get("prompt"), value.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise RecordInvalid("MISSING_FIELD", "`prompt` and `completion` must both be texts.")
    user = ChatMessage(Role.USER, _text(prompt, "prompt"))
    return Record((user, ChatMessage(Role.ASSISTANT, _text(completion, "completion"))), is_completion=True)
