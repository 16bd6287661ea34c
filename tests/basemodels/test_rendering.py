"""Rendering: what is trained is the assistant's words and their end token, and serving feeds what training saw."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from server.basemodels.encoding import Rendered
from server.basemodels.errors import RenderingRefused
from server.basemodels.loading import load_tokenizer
from server.basemodels.rendering import Renderer, find_stop_token_ids, hash_template, render
from server.domain.generation import ChatMessage, Role
from tests.tiny_models import FAMILIES, build_tiny_causal_model

CONVERSATION = (
    ChatMessage(Role.USER, "Who keeps the maps?"),
    ChatMessage(Role.ASSISTANT, "The keeper."),
    ChatMessage(Role.USER, "When?"),
    ChatMessage(Role.ASSISTANT, "Every day."),
)


@pytest.fixture(scope="module", params=[(family, template) for family in FAMILIES for template in (True, False)], ids=str)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    family, template = request.param
    return load_tokenizer(build_tiny_causal_model(tmp_path_factory.mktemp(family), family, chat_template=template))


def render_completion(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str | None = None) -> Rendered:
    renderer = Renderer(tokenizer)
    return renderer.encoder.encode(renderer.lay_out_plain(prompt, completion))


def trained_texts(tokenizer: PreTrainedTokenizerBase, messages: tuple[ChatMessage, ...]) -> list[str]:
    rendered = render(tokenizer, messages)
    return [str(tokenizer.decode(rendered.token_ids[span.start : span.end])).strip() for span in rendered.spans]


def test_each_assistant_turn_and_its_end_token_are_trained_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = render(tokenizer, CONVERSATION)
    stops = find_stop_token_ids(tokenizer)
    assert len(rendered.spans) == 2
    assert all(rendered.token_ids[span.end - 1] in stops for span in rendered.spans)
    texts = trained_texts(tokenizer, CONVERSATION)
    assert [text[: len(answer)] for text, answer in zip(texts, ("The keeper.", "Every day."), strict=True)] == ["The keeper.", "Every day."]
    untrained = [token for token, trained in zip(rendered.token_ids, rendered.trained_mask, strict=True) if not trained]
    assert "keeper." not in str(tokenizer.decode(untrained))


def test_serving_feeds_the_ids_that_training_saw_before_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = render(tokenizer, CONVERSATION)
    for turn, span in zip((1, 3), rendered.spans, strict=True):
        prompt = render(tokenizer, CONVERSATION[:turn], add_generation_prompt=True)
        assert prompt.token_ids == rendered.token_ids[: span.start]


def test_the_text_begins_with_one_bos_at_most(tokenizer: PreTrainedTokenizerBase) -> None:
    bos = tokenizer.bos_token_id
    if tokenizer("a")["input_ids"][0] == bos:
        assert render(tokenizer, CONVERSATION).token_ids.count(bos) == 1
        assert render_completion(tokenizer, "The river").token_ids[0] == bos
    doubled = render_completion(tokenizer, f"{tokenizer.bos_token or ''}The river", " town")
    assert bos is None or doubled.token_ids[:2] != [bos, bos]


def test_padding_is_never_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id < len(tokenizer)


def test_a_completion_is_continued_as_it_is_and_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = render_completion(tokenizer, "The river", " town.")
    (span,) = rendered.spans
    assert rendered.token_ids[: span.start] == render_completion(tokenizer, "The river").token_ids
    assert rendered.token_ids[span.end - 1] == tokenizer.eos_token_id
    assert str(tokenizer.decode(rendered.token_ids[span.start : span.end - 1])) == " town."


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(build_tiny_causal_model(tmp_path / "llama"))


def test_an_answer_that_would_merge_with_the_prompt_keeps_the_served_prompt(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    # A byte-level tokenizer may join the prompt's last line break with one that begins the answer.
    messages = (ChatMessage(Role.USER, "When?"), ChatMessage(Role.ASSISTANT, "\n\n  Every day."))
    rendered = render(chat_tokenizer, messages)
    prompt = render(chat_tokenizer, messages[:1], add_generation_prompt=True)
    assert rendered.token_ids[: rendered.spans[0].start] == prompt.token_ids
    assert "Every day." in str(chat_tokenizer.decode(rendered.token_ids[rendered.spans[0].start :]))


def test_a_template_that_rewrites_earlier_turns_is_refused_for_training_but_not_for_serving(
    chat_tokenizer: PreTrainedTokenizerBase,
) -> None:
    chat_tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' and not loop.last %}{{ '(left out)' }}{% else %}{{ message['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(RenderingRefused) as refused:
        render(chat_tokenizer, CONVERSATION)
    assert refused.value.reason == "TEMPLATE_REWRITES_TURNS"
    assert "(left out)" in str(chat_tokenizer.decode(render(chat_tokenizer, CONVERSATION[:3], add_generation_prompt=True).token_ids))
    assert len(render(chat_tokenizer, CONVERSATION[:2]).spans) == 1


def test_an_end_of_text_after_the_last_turn_does_not_hide_earlier_turns(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    template = str(chat_tokenizer.chat_template)
    chat_tokenizer.chat_template = template + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert trained_texts(chat_tokenizer, CONVERSATION)[0] == "The keeper.<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_refused_with_its_reason(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_tiny_causal_model(tmp_path / "mistral", "mistral"))
    with pytest.raises(RenderingRefused, match="System role not supported"):
        render(tokenizer, (ChatMessage(Role.SYSTEM, "Be brief."), *CONVERSATION))


def test_a_template_cannot_reach_out_of_its_sandbox(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RenderingRefused):
        render(chat_tokenizer, CONVERSATION)


def test_another_template_has_another_hash(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    before = hash_template(chat_tokenizer)
    chat_tokenizer.chat_template = str(chat_tokenizer.chat_template) + " "
    assert hash_template(chat_tokenizer) != before
