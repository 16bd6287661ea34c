"""Cross-encoders: the scores of Sentence Transformers, a known order, the time limit, and what is no cross-encoder."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sentence_transformers import CrossEncoder

from server.domain.errors import FailedPrecondition, NotFound, ResourceExhausted
from server.rag import reranking
from server.rag.reranking import CrossEncoders
from server.rag.shelf import Shelf, measure_weights
from tests.tiny_cross_encoders import build_tiny_cross_encoder

TOLERANCE = 1e-5
IDENTITY = "torch.nn.modules.linear.Identity"
QUERY = "Who keeps the maps?"
TEXTS = ["The keeper keeps the maps.", "", "a", "old bridge " * 100, "في المدينة بيت أزرق", "maps " * 40, "\ud800 x"]


def make(directory: Path, max_bytes: int = 1 << 30) -> CrossEncoders:
    return CrossEncoders(lambda _: directory, Shelf(max_bytes))


def score(directory: Path, texts: list[str], query: str = QUERY) -> list[float]:
    scores = make(directory).score("m", query, texts, time.monotonic() + 60)
    assert scores is not None
    return list(scores)


@pytest.mark.parametrize(("family", "activation"), [("bert", ""), ("bert", IDENTITY), ("xlm-roberta", ""), ("xlm-roberta", IDENTITY)])
@pytest.mark.parametrize("query", [QUERY, "the old bridge " * 40])
def test_scores_are_those_of_sentence_transformers(tmp_path: Path, family: str, activation: str, query: str) -> None:
    directory = build_tiny_cross_encoder(tmp_path, family, activation=activation)
    library = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    texts = [text for text in TEXTS if "\ud800" not in text]
    expected = library.predict([(query, text) for text in texts]).tolist()
    assert score(directory, texts, query) == pytest.approx(expected, abs=TOLERANCE)
    assert max(expected) - min(expected) > 0.01


def test_a_directory_that_the_library_saved_keeps_its_activation(tmp_path: Path) -> None:
    library = CrossEncoder(str(build_tiny_cross_encoder(tmp_path / "made", activation=IDENTITY)), device="cpu", local_files_only=True)
    library.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    expected = library.predict([(QUERY, "maps")]).tolist()
    assert score(tmp_path / "saved", ["maps"]) == pytest.approx(expected, abs=TOLERANCE)
    assert not 0 <= expected[0] <= 1 or expected != score(build_tiny_cross_encoder(tmp_path / "made"), ["maps"])


def test_the_text_with_more_of_the_word_is_better(tmp_path: Path) -> None:
    directory = build_tiny_cross_encoder(tmp_path, counted_word="maps")
    scores = score(directory, ["the house", "maps", "maps the house", "maps maps maps"], "house")
    assert scores[3] > scores[1] > scores[2] > scores[0]


def test_scores_do_not_depend_on_what_else_is_scored(tmp_path: Path) -> None:
    directory = build_tiny_cross_encoder(tmp_path)
    assert score(directory, TEXTS) == pytest.approx([score(directory, [text])[0] for text in TEXTS], abs=TOLERANCE)
    assert score(directory, []) == []


def test_the_time_is_looked_at_before_each_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reranking, "FLOPS_PER_BATCH", 0)  # one pair in a batch
    loaded = make(build_tiny_cross_encoder(tmp_path))
    assert loaded.score("m", QUERY, TEXTS, time.monotonic() + 60) is not None
    model = loaded._shelf.take(reranking.CrossEncoder, "m", lambda: tmp_path, lambda _: pytest.fail("loaded twice"))
    asked: list[bool] = []

    def is_over() -> bool:
        asked.append(len(asked) == 3)
        return asked[-1]

    assert model.score(QUERY, TEXTS, is_over) is None
    assert len(asked) == 4
    assert loaded.score("m", QUERY, TEXTS, time.monotonic() - 1) is None


def test_where_the_time_is_over_before_the_start_nothing_is_loaded() -> None:
    encoders = CrossEncoders(lambda name: pytest.fail(f"{name} was looked for"), Shelf(1 << 30))
    assert encoders.score("m", QUERY, TEXTS, time.monotonic() - 1) is None


def test_an_alias_and_the_hub_name_are_one_model(tmp_path: Path) -> None:
    directory, asked = build_tiny_cross_encoder(tmp_path), list[str]()

    def resolve(name: str) -> Path:
        asked.append(name)
        return directory

    encoders = CrossEncoders(resolve, Shelf(1 << 30))
    for name in ("bge-reranker-v2-m3", "BAAI/bge-reranker-v2-m3", "BGE-Reranker-v2-M3"):
        encoders.score(name, QUERY, ["maps"], time.monotonic() + 60)
    assert asked == ["BAAI/bge-reranker-v2-m3"]


def damage_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_text("{")


def ask_for_another_activation(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text()) | {"sentence_transformers": {"activation_fn": "mine.Squash"}}
    (directory / "config.json").write_text(json.dumps(config))


def spoil_numbers(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["classifier.bias"] = torch.full((1,), math.nan)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (damage_weights, "cannot be loaded"),
        (ask_for_another_activation, "ends in Squash"),
        (spoil_numbers, "numbers that are none"),
        (lambda directory: (directory / "model.safetensors").rename(directory / "pytorch_model.bin"), "cannot be loaded"),
    ],
)
def test_what_cannot_rank_is_refused_and_its_path_is_not_told(tmp_path: Path, spoil: Callable[[Path], None], why: str) -> None:
    directory = build_tiny_cross_encoder(tmp_path)
    spoil(directory)
    with pytest.raises(FailedPrecondition, match=why) as refused:
        score(directory, ["maps"])
    assert refused.value.reason == "CROSS_ENCODER_UNAVAILABLE"
    assert str(tmp_path) not in str(refused.value)


def test_a_classifier_of_two_labels_is_no_cross_encoder(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="gives 2 scores"):
        score(build_tiny_cross_encoder(tmp_path, labels=2), ["maps"])


def test_what_the_resolver_says_reaches_the_caller() -> None:
    def resolve(name: str) -> Path:
        raise NotFound.of("base model", name)

    with pytest.raises(NotFound):
        CrossEncoders(resolve, Shelf(1 << 30)).score("m", QUERY, ["maps"], time.monotonic() + 60)


def test_a_model_beyond_the_memory_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    directory = build_tiny_cross_encoder(tmp_path)
    with pytest.raises(ResourceExhausted) as refused:
        make(directory, measure_weights(directory) - 1).score("m", QUERY, ["maps"], time.monotonic() + 60)
    assert refused.value.reason == "ENGINE_OUT_OF_MEMORY"
