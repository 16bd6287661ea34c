"""Prompts: tools and their answers through the template, histories that are too long, templates that never end."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.basemodels.errors import RenderingRefused
from server.domain.errors import InvalidInput
from server.domain.generation import ChatMessage, GenerationParameters, GenerationRequest, HistoryPolicy, ModelReference, Role
from server.domain.records import ToolCall
from server.inference import prompts
from server.inference.engine import EmbeddedEngine
from server.inference.prompts import PromptBuilder
from server.inference.timelimit import run_within
from tests.inference.asking import ask, collect
from tests.inference.engines import make_engine
from tests.tiny_models import CHATML, CONTEXT_TOKENS, build_tiny_causal_model

TOOL = json.dumps({"type": "function", "function": {"name": "find_map", "parameters": {"type": "object"}}})
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<call>' + call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{% if message['tool_call_id'] %}{{ ' for ' + message['tool_call_id'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in range(100000) %}{% endfor %}{% endfor %}{% endfor %}x"


@pytest.fixture
def tokenizer(tiny: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny("llama"))
    return made


def chat(messages: Sequence[ChatMessage], **more: object) -> GenerationRequest:
    request = GenerationRequest("r", ModelReference("llama", "llama"), GenerationParameters(temperature=0, max_tokens=8), messages=messages)
    return replace(request, **more)  # type: ignore[arg-type]  # fields of the request


def talk(exchanges: int, system: str = "") -> list[ChatMessage]:
    turns = [ChatMessage(Role.SYSTEM, system)] if system else []
    for number in range(exchanges):
        turns += [ChatMessage(Role.USER, f"Question {number} of many"), ChatMessage(Role.ASSISTANT, f"Answer {number} to it")]
    return [*turns, ChatMessage(Role.USER, "The last question")]


def test_tools_calls_and_their_answers_go_through_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TOOLS_TEMPLATE
    messages = [
        ChatMessage(Role.USER, "Where is it?"),
        ChatMessage(Role.ASSISTANT, "", (ToolCall("find_map", '{"town": "Sanmara"}', "c1"),)),
        ChatMessage(Role.TOOL, "In the blue house", name="find_map", call_id="c1"),
    ]
    built = PromptBuilder(tokenizer).build(chat(messages, tools=(TOOL,)), CONTEXT_TOKENS)
    assert '"name": "find_map"' in built.text
    assert '<call>find_map{"town": "Sanmara"}' in built.text
    assert built.text.endswith("tool\nIn the blue house for c1<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(list(built.token_ids)) == built.text


@pytest.mark.parametrize("name", ["find_map", "a"])
def test_a_template_that_drops_the_tools_refuses_them_though_their_name_stands_in_the_text(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(InvalidInput) as refused:
        PromptBuilder(tokenizer).build(chat(talk(0), tools=(TOOL.replace("find_map", name),)), CONTEXT_TOKENS)
    assert refused.value.reason == "TOOLS_NOT_SUPPORTED"


async def test_a_history_over_the_context_is_refused_or_loses_as_few_of_its_oldest_turns_as_can_be(engine: EmbeddedEngine) -> None:
    request = chat(talk(30, "Be brief"))
    with pytest.raises(InvalidInput) as refused:
        await collect(engine.generate(request))
    assert refused.value.reason == "PROMPT_TOO_LONG"
    whole = await engine.render(request)
    assert (len(whole.token_ids) > CONTEXT_TOKENS, whole.dropped_messages) == (True, 0)
    answer = await collect(engine.generate(replace(request, history=HistoryPolicy.DROP_OLDEST, echo_prompt=True)))
    dropped, text = answer.end.dropped_messages, answer.end.rendered_prompt
    assert text is not None
    assert dropped > 0
    assert dropped % 2 == 0
    assert "Be brief" in text
    assert "The last question" in text
    assert f"Question {dropped // 2 - 1} " not in text
    assert f"Question {dropped // 2} " in text
    assert answer.end.usage.prompt_tokens + 8 <= CONTEXT_TOKENS
    one_more = replace(request, messages=(request.messages[0], *request.messages[dropped - 1 :]))
    assert len((await engine.render(one_more)).token_ids) + 8 > CONTEXT_TOKENS, "no turn was dropped in vain"
    short = await collect(engine.generate(chat(talk(2), history=HistoryPolicy.DROP_OLDEST)))
    assert (short.end.dropped_messages, short.end.rendered_prompt) == (0, None)


async def test_a_last_turn_that_alone_is_too_long_is_refused_under_any_policy(engine: EmbeddedEngine) -> None:
    messages = [*talk(2)[:-1], ChatMessage(Role.USER, "maps " * CONTEXT_TOKENS)]
    with pytest.raises(InvalidInput) as refused:
        await collect(engine.generate(chat(messages, history=HistoryPolicy.DROP_OLDEST)))
    assert refused.value.reason == "PROMPT_TOO_LONG"


async def test_a_template_that_never_ends_fails_its_own_requests_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.5)
    table = {"llama": build_tiny_causal_model(tmp_path / "good"), "endless": build_tiny_causal_model(tmp_path / "endless")}
    (tmp_path / "endless" / "chat_template.jinja").write_text(ENDLESS)
    engine = make_engine(table, tmp_path)
    engine.start()
    endless = chat(talk(0), model=ModelReference("endless", "endless"))
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(RenderingRefused) as refused:
            await collect(engine.generate(endless))
        assert refused.value.reason == "TEMPLATE_TOO_SLOW"
        assert (await collect(engine.generate(chat(talk(0))))).text
    assert time.monotonic() - start < 0.4, "it is not tried again for each request"
    assert (await collect(engine.generate(ask("The river", model="endless")))).text, "prompts need no template"
    assert not [thread for thread in threading.enumerate() if thread.name == "limited"]
    await engine.stop()


def test_what_is_limited_in_time_gives_its_result_or_its_error() -> None:
    assert run_within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        run_within(5, lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        run_within(0.05, lambda: [None for _ in iter(int, 1)])
