"""Training records: what is learnt from, whatever form it was kept in, and what makes a value none."""

from dataclasses import dataclass
from enum import StrEnum

from server.domain.datasets import RecordKind
from server.domain.findings import Finding, Severity

MAX_RECORD_BYTES = 4 << 20  # a longer record is none; bounds the memory of a reader


class TurnRole(StrEnum):
    """Who speaks in a record."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant makes. `arguments` is the JSON text of an object."""

    name: str
    arguments: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `weight` is how much the prediction of an assistant's message counts; 0: it is read, not learnt."""

    role: TurnRole
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Record:
    """What to learn from. A pair has its prompt in `turns` and the answers in `chosen` and `rejected`; a text only `text`.

    `is_plain`: the turns are a prompt and its continuation (or continuations), joined as they are, without a chat template.
    `tools` are JSON texts, one per tool that the assistant may call.
    """

    kind: RecordKind
    turns: tuple[Turn, ...] = ()
    text: str = ""
    chosen: tuple[Turn, ...] = ()
    rejected: tuple[Turn, ...] = ()
    tools: tuple[str, ...] = ()
    is_plain: bool = False

    @property
    def is_pair(self) -> bool:
        """Whether it holds a chosen and a rejected answer."""
        return self.kind is RecordKind.PREFERENCE

    @property
    def texts(self) -> tuple[str, ...]:
        """All that it says, in order."""
        return (self.text,) if self.text else tuple(turn.content for turn in (*self.turns, *self.chosen, *self.rejected))


class RecordInvalid(ValueError):
    """A value is no record: `code` is stable, the message is for a person."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def to_finding(self, line: int) -> Finding:
        """Name the line (from 1) that this was found on."""
        return Finding(line, self.code, str(self), Severity.ERROR)


def make_too_long() -> RecordInvalid:
    """Say that a record is larger than any may be."""
    return RecordInvalid("RECORD_TOO_LONG", f"The record has more than {MAX_RECORD_BYTES >> 20} MiB.")


def check_turns(turns: tuple[Turn, ...]) -> None:
    """Demand an optional system turn, then user and assistant in turn; tools may answer between two of the assistant's.

    Raises RecordInvalid.
    """
    last: Turn | None = None
    for place, turn in enumerate(turns):
        if turn.role is TurnRole.SYSTEM and place == 0:
            continue
        due = _find_due_roles(last)
        if turn.role not in due:
            expected = " or ".join(f"the {role.value}'s" for role in due)
            raise RecordInvalid("BAD_ROLE_ORDER", f"messages[{place}] is the {turn.role.value}'s where {expected} is due.")
        last = turn
    if last is None:
        raise RecordInvalid("BAD_ROLE_ORDER", "There is no user turn.")


def _find_due_roles(last: Turn | None) -> tuple[TurnRole, ...]:
    if last is None:
        return (TurnRole.USER,)
    if last.role is TurnRole.USER:
        return (TurnRole.ASSISTANT,)
    if last.role is TurnRole.TOOL:
        return TurnRole.ASSISTANT, TurnRole.TOOL
    return (TurnRole.TOOL,) if last.tool_calls else (TurnRole.USER,)
