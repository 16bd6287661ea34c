"""The forms in which people keep training records, each to a Record, or to the reason why it is none. Knows no files.

Upload, preview and training read records through these functions: what was accepted is what is trained.
"""

import json
import math
from collections.abc import Callable, Mapping

from server.domain.datasets import RecordKind
from server.domain.records import MAX_RECORD_BYTES, Record, RecordInvalid, ToolCall, Turn, TurnRole, check_turns, make_too_long
from server.domain.retrieval_evaluation import parse_query

Value = Mapping[str, object]
MAX_WEIGHT = 100.0  # beyond it a message drowns all others

# Who says a turn of a ShareGPT conversation; the names are those found in published data sets.
SPEAKERS = {
    "system": TurnRole.SYSTEM, "human": TurnRole.USER, "user": TurnRole.USER, "gpt": TurnRole.ASSISTANT, "assistant": TurnRole.ASSISTANT,
    "chatgpt": TurnRole.ASSISTANT, "model": TurnRole.ASSISTANT, "tool": TurnRole.TOOL, "observation": TurnRole.TOOL,
}  # fmt: skip
ROLES = {role.value: role for role in TurnRole} | {"developer": TurnRole.SYSTEM, "function": TurnRole.TOOL}


def parse_record(line: bytes, kind: RecordKind = RecordKind.MIXED) -> Record:
    """Read one JSONL line. Raises RecordInvalid."""
    return parse_value(parse_json(line), kind)


def parse_json(line: bytes) -> object:
    """Read the JSON value of a line. Raises RecordInvalid."""
    if len(line) > MAX_RECORD_BYTES:
        raise make_too_long()
    try:
        value: object = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise RecordInvalid("NOT_UTF8", "The line is not UTF-8 text.") from None
    except (ValueError, RecursionError) as error:  # also a number with thousands of digits
        detail = f" ({error.msg} at character {error.colno})" if isinstance(error, json.JSONDecodeError) else " (nested too deep)"
        raise RecordInvalid("BROKEN_JSON", f"The line is not JSON{detail}.") from None
    return value


def parse_value(value: object, kind: RecordKind = RecordKind.MIXED) -> Record:
    """Read a record in the form `kind`; MIXED: in the form that its fields show. Raises RecordInvalid."""
    if not isinstance(value, dict):
        raise RecordInvalid("NOT_AN_OBJECT", "The record is not an object with fields.")
    recognised = recognise_kind(value) if kind is RecordKind.MIXED else kind
    if recognised is None:
        raise RecordInvalid("MISSING_FIELD", f"The record has none of the known fields ({', '.join(MARKS.values())}).")
    return PARSERS[recognised](value)


# The fields that tell a form, the more telling first.
MARKS = {
    RecordKind.CHAT: "`messages`",
    RecordKind.SHAREGPT: "`conversations`",
    RecordKind.PREFERENCE: "`prompt`, `chosen` and `rejected`",
    RecordKind.RETRIEVAL: "`query` and `relevant`",
    RecordKind.COMPLETION: "`prompt` and `completion`",
    RecordKind.INSTRUCTION: "`instruction` and `output`",
    RecordKind.TEXT: "`text`",
}


def recognise_kind(value: Value) -> RecordKind | None:
    """Tell a record's form by the names of its fields."""
    if "messages" in value:
        return RecordKind.CHAT
    if "conversations" in value:
        return RecordKind.SHAREGPT
    if "chosen" in value or "rejected" in value:
        return RecordKind.PREFERENCE
    if "relevant" in value:
        return RecordKind.RETRIEVAL
    if "completion" in value:
        return RecordKind.COMPLETION
    if "instruction" in value:
        return RecordKind.INSTRUCTION
    if "text" in value:
        return RecordKind.TEXT
    return RecordKind.COMPLETION if "prompt" in value else None


def _parse_chat(value: Value) -> Record:
    turns = _parse_messages(value.get("messages"), "messages")
    _check_conversation(turns)
    return Record(RecordKind.CHAT, turns, tools=_parse_tools(value))


def _parse_sharegpt(value: Value) -> Record:
    raw = value.get("conversations")
    if not isinstance(raw, list) or not raw:
        raise RecordInvalid("EMPTY_MESSAGES", "`conversations` must be a list with at least one turn of a human and one of gpt.")
    turns = tuple(_parse_speech(item, place) for place, item in enumerate(raw))
    if isinstance(system := value.get("system"), str) and system.strip() and turns[0].role is not TurnRole.SYSTEM:
        turns = (Turn(TurnRole.SYSTEM, _text(system, "system")), *turns)
    _check_conversation(turns)
    return Record(RecordKind.SHAREGPT, turns, tools=_parse_tools(value))


def _parse_speech(item: object, place: int) -> Turn:
    name = f"conversations[{place}]"
    if not isinstance(item, dict) or not isinstance(item.get("from"), str) or not isinstance(item.get("value"), str):
        raise RecordInvalid("BAD_MESSAGE", f"{name} must be an object with the texts `from` and `value`.")
    role = SPEAKERS.get(item["from"].lower())
    if role is None:
        raise RecordInvalid("UNKNOWN_ROLE", f"{name}.from is {item['from'][:40]!r}; it must be one of {', '.join(SPEAKERS)}.")
    return Turn(role, _text(item["value"], f"{name}.value"), weight=_parse_weight(item, role, name))


def _parse_completion(value: Value) -> Record:
    prompt, completion = value.get("prompt"), value.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = tuple(_read_only(turn) for turn in _parse_messages(prompt, "prompt"))
        turns = (*asked, *_parse_messages(completion, "completion"))
        _check_conversation(turns)
        return Record(RecordKind.COMPLETION, turns, tools=_parse_tools(value))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise RecordInvalid("MISSING_FIELD", "`prompt` and `completion` must both be texts.")
    user = Turn(TurnRole.USER, _text(prompt, "prompt"))
    return Record(RecordKind.COMPLETION, (user, Turn(TurnRole.ASSISTANT, _text(completion, "completion"))), is_plain=True)


def _parse_instruction(value: Value) -> Record:
    instruction, output, more = value.get("instruction"), value.get("output"), value.get("input")
    if not isinstance(instruction, str) or not isinstance(output, str):
        raise RecordInvalid("MISSING_FIELD", "`instruction` and `output` must both be texts.")
    asked = _text(instruction, "instruction")
    if isinstance(more, str) and more.strip():
        asked += "\n\n" + _text(more, "input")
    turns: tuple[Turn, ...] = (Turn(TurnRole.USER, asked), Turn(TurnRole.ASSISTANT, _text(output, "output")))
    if isinstance(system := value.get("system"), str) and system.strip():
        turns = (Turn(TurnRole.SYSTEM, _text(system, "system")), *turns)
    return Record(RecordKind.INSTRUCTION, turns)


def _parse_text(value: Value) -> Record:
    text = value.get("text")
    if not isinstance(text, str):
        raise RecordInvalid("MISSING_FIELD", "`text` must be a text.")
    return Record(RecordKind.TEXT, text=_text(text, "text"))


def _parse_preference(value: Value) -> Record:
    prompt, chosen, rejected = value.get("prompt"), value.get("chosen"), value.get("rejected")
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        asked: tuple[Turn, ...] = (Turn(TurnRole.USER, _text(prompt, "prompt")),)
        answers = [(Turn(TurnRole.ASSISTANT, _text(text, name)),) for text, name in ((chosen, "chosen"), (rejected, "rejected"))]
        return _make_pair(asked, answers[0], answers[1], (), is_plain=True)
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise RecordInvalid("MISSING_FIELD", "`chosen` and `rejected` must both be texts (with a `prompt`) or both lists of messages.")
    good, bad = _parse_messages(chosen, "chosen"), _parse_messages(rejected, "rejected")
    if isinstance(prompt, list):
        asked = _parse_messages(prompt, "prompt")
    elif isinstance(prompt, str) and len(good) == len(bad) == 1:
        asked = (Turn(TurnRole.USER, _text(prompt, "prompt")),)
    else:  # both hold the whole conversation: what they share is the prompt
        shared = next((place for place, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
        asked, good, bad = good[:shared], good[shared:], bad[shared:]
    return _make_pair(asked, good, bad, _parse_tools(value), is_plain=False)


def _parse_retrieval(value: Value) -> Record:
    return Record(RecordKind.RETRIEVAL, text=parse_query(value).query)


def _parse_prompt(value: Value) -> Record:
    name = "messages" if "messages" in value else "prompt"
    if isinstance(prompt := value.get(name), str):
        return Record(RecordKind.PROMPT, (Turn(TurnRole.USER, _text(prompt, name)),), is_plain=True)
    turns = _parse_messages(prompt, name)
    check_turns(turns)
    return Record(RecordKind.PROMPT, turns, tools=_parse_tools(value))


def _make_pair(
    asked: tuple[Turn, ...], chosen: tuple[Turn, ...], rejected: tuple[Turn, ...], tools: tuple[str, ...], *, is_plain: bool
) -> Record:
    if chosen == rejected:
        raise RecordInvalid("EQUAL_ANSWERS", "The chosen and the rejected answer are the same: there is nothing to prefer.")
    for answer in (chosen, rejected):
        if not answer:
            raise RecordInvalid("EMPTY_MESSAGES", "One of the answers is empty.")
        _check_conversation((*asked, *answer))
    return Record(RecordKind.PREFERENCE, asked, chosen=chosen, rejected=rejected, tools=tools, is_plain=is_plain)


def _check_conversation(turns: tuple[Turn, ...]) -> None:
    check_turns(turns)
    if turns[-1].role is not TurnRole.ASSISTANT:
        raise RecordInvalid("BAD_ROLE_ORDER", "The last message must be the assistant's.")


def _parse_messages(raw: object, name: str) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise RecordInvalid("EMPTY_MESSAGES", f"`{name}` must be a list with at least one message.")
    return tuple(_parse_message(item, f"{name}[{place}]") for place, item in enumerate(raw))


def _parse_message(item: object, name: str) -> Turn:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise RecordInvalid("BAD_MESSAGE", f"{name} must be an object with the texts `role` and `content`.")
    role = ROLES.get(item["role"])
    if role is None:
        raise RecordInvalid("UNKNOWN_ROLE", f"{name}.role is {item['role'][:40]!r}; it must be system, user, assistant or tool.")
    calls = _parse_calls(item, name) if role is TurnRole.ASSISTANT else ()
    content = _join_parts(item.get("content"), name, is_optional=bool(calls))
    return Turn(
        role,
        content if calls and not content.strip() else _text(content, f"{name}.content"),
        calls,
        name=_optional_text(item, "name"),
        call_id=_optional_text(item, "tool_call_id"),
        weight=_parse_weight(item, role, name),
    )


def _join_parts(content: object, name: str, *, is_optional: bool) -> str:
    """Give a message's text; the list of text parts that some interfaces use is joined."""
    if isinstance(content, str):
        return content
    if content is None and is_optional:
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise RecordInvalid("BAD_MESSAGE", f"{name}.content must be a text.")


def _parse_calls(item: Value, name: str) -> tuple[ToolCall, ...]:
    raw = item.get("tool_calls")
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise RecordInvalid("BAD_TOOL_CALL", f"{name}.tool_calls must be a list.")
    return tuple(_parse_call(call, f"{name}.tool_calls[{place}]") for place, call in enumerate(raw))


def _parse_call(call: object, name: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordInvalid("BAD_TOOL_CALL", f"{name} must be an object with a `function` that has a `name` and `arguments`.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise RecordInvalid("BAD_TOOL_CALL", f"{name}: `arguments` must be an object, or the JSON text of one.")
    written = _text(json.dumps(arguments, ensure_ascii=False), f"{name}.arguments")
    return ToolCall(_text(function["name"], f"{name}.name"), written, _optional_text(call, "id"))


def _parse_tools(value: Value) -> tuple[str, ...]:
    raw = value.get("tools")
    if isinstance(raw, str) and raw.strip():
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise RecordInvalid("BAD_TOOLS", "`tools` is a text that is not JSON.") from None
    if not raw:
        return ()
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise RecordInvalid("BAD_TOOLS", "`tools` must be a list of objects, one per tool.")
    return tuple(_text(json.dumps(tool, ensure_ascii=False), "tools") for tool in raw)


def _parse_weight(item: Value, role: TurnRole, name: str) -> float:
    weight = item.get("weight")
    if weight is None or role is not TurnRole.ASSISTANT:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (math.isfinite(weight) and 0 <= weight <= MAX_WEIGHT):
        raise RecordInvalid("BAD_WEIGHT", f"{name}.weight must be a number from 0 to {MAX_WEIGHT:g}.")
    return float(weight)


def _read_only(turn: Turn) -> Turn:
    """Give a turn of the prompt: read, not learnt."""
    return Turn(turn.role, turn.content, turn.tool_calls, turn.name, turn.call_id, weight=0.0)


def _optional_text(item: Value, name: str) -> str:
    text = item.get(name)
    return text if isinstance(text, str) else ""


def _text(content: str, name: str) -> str:
    if not content.strip():
        raise RecordInvalid("EMPTY_TEXT", f"{name} is empty.")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordInvalid("NOT_UTF8", f"{name} is not text: it has half of a surrogate pair, or bytes that are not UTF-8.") from None
    return content


PARSERS: Mapping[RecordKind, Callable[[Value], Record]] = {
    RecordKind.CHAT: _parse_chat,
    RecordKind.SHAREGPT: _parse_sharegpt,
    RecordKind.COMPLETION: _parse_completion,
    RecordKind.INSTRUCTION: _parse_instruction,
    RecordKind.TEXT: _parse_text,
    RecordKind.PREFERENCE: _parse_preference,
    RecordKind.RETRIEVAL: _parse_retrieval,
    RecordKind.PROMPT: _parse_prompt,
}
