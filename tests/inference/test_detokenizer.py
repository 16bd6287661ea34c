"""Text from tokens: whole characters, stop strings across token borders, and nothing lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.inference.detokenizer import Detokenizer, TextStream
from server.inference.sampling import Choice
from server.inference.transcript import Transcript

TEXTS = (
    "Hello, how are you today?",
    "في المدينة بيت أزرق تُحفظ فيه الخرائط.",
    "naïve 日本語 text\n\n\twith  spaces",
    "👩‍👩‍👧‍👦 family, 👍🏽 thumb, 🇸🇦🇪🇬 flags, ❤️ heart",
    "e\u0301 combining, \ufffd itself is fine in the middle",
)


@pytest.fixture(scope="module")
def tokenizer(tiny: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer: most characters above ASCII take several tokens."""
    loaded = AutoTokenizer.from_pretrained(tiny("llama"))
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def stream(tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    transcript = TextStream(tokenizer, stop)
    deltas = []
    for token_id in encode(tokenizer, text):
        deltas.append(transcript.push(token_id))
        if transcript.is_stopped:
            return deltas, transcript
    return [*deltas, transcript.finish()], transcript


@pytest.mark.parametrize("text", TEXTS)
def test_deltas_join_to_the_text_and_split_no_character(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    deltas, _ = stream(tokenizer, text)
    assert "".join(deltas) == text
    assert len([d for d in deltas if d]) > 3
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


def test_a_picture_of_several_characters_comes_in_one_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    deltas, _ = stream(tokenizer, "a👩‍👩‍👧‍👦b🇸🇦c👍🏽")
    assert [d for d in deltas if d] == ["a", "👩‍👩‍👧‍👦b", "🇸🇦c", "👍🏽"]


def test_plain_text_is_not_held_back(tokenizer: PreTrainedTokenizerBase) -> None:
    deltas, _ = stream(tokenizer, "Hello")
    assert all(deltas[:-1])


def test_an_incomplete_character_at_the_end_is_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(tokenizer, "a日")
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(token_id) for token_id in ids[:-1])
    assert text + detokenizer.finish() == "a"


def test_bytes_that_never_become_a_character_do_not_pile_up(tokenizer: PreTrainedTokenizerBase) -> None:
    lonely = encode(tokenizer, "日")[0]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(lonely) for _ in range(100))
    assert len(text) > 80
    assert len(detokenizer._window) < 20


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("aaab done", ("aab",), "a"),
        ("ends with sto", ("stop",), "ends with sto"),
        ("### Assistant: hi\n### User: no", ("\n### User:",), "### Assistant: hi"),
        ("بيت أزرق جميل", ("أزرق",), "بيت "),
        ("نص👍🏽 نهاية", ("👍🏽",), "نص"),
        ("abc", ("a",), ""),
        ("abcabd", ("abd", "xx"), "abc"),
    ],
)
def test_stop_strings_end_the_text_and_never_leak(
    text: str, stop: tuple[str, ...], expected: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    deltas, transcript = stream(tokenizer, text, stop)
    assert "".join(deltas) == expected
    assert transcript.is_stopped == any(s in text for s in stop)
    shown = ""
    for delta in deltas:
        shown += delta
        assert expected.startswith(shown), "no piece of a stop string was shown even for a moment"


def test_random_tokens_give_the_same_text_piecewise_as_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    letters = [i for i in range(5, len(tokenizer)) if str(tokenizer.decode([i])).isascii()]
    picks = torch.randint(0, len(letters), (300,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = [letters[i] for i in picks]
    transcript = TextStream(tokenizer, ())
    text = "".join(transcript.push(token_id) for token_id in ids) + transcript.finish()
    assert text == tokenizer.decode(ids)


def test_log_probabilities_wait_for_their_text_and_show_no_stop_string(tokenizer: PreTrainedTokenizerBase) -> None:
    transcript = Transcript(tokenizer, ("two",))
    named = []
    for token_id in encode(tokenizer, "one two three"):
        for delta in transcript.add(Choice(token_id, -0.5, ((token_id, -0.5),)), is_end=False, is_last=False):
            named += [position.chosen.token for position in delta.logprobs]
        if transcript.is_stopped:
            break
    assert "one".startswith("".join(named).strip()) or "".join(named).strip() == "one"
    assert "t" not in "".join(named)
