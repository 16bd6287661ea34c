"""Embedding: the same vectors as Sentence Transformers, each family's pooling and prefixes, and nothing unsafe is loaded."""

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from transformers import AutoTokenizer

from server.domain.embeddings import EmbeddingBackend
from server.domain.errors import FailedPrecondition, ResourceExhausted
from server.domain.generation import EmbedRole
from server.rag.embedding import Embedder, LoadedModel, Vectors
from server.rag.shelf import Shelf, measure_weights
from tests.rag.conftest import MINILM
from tests.rag.tiny_encoders import build_tiny_xlm_roberta, write_modules
from tests.tiny_models import build_tiny_embedding_model

TOLERANCE = 1e-3
FAR = 0.05
DOCUMENTS = sorted((Path(__file__).parents[2] / "examples" / "documents").glob("*.md"))
TEXTS = ["The maps lie in a blue house.", "Who keeps the maps?", "", "old bridge " * 200, "الخرائط في بيت أزرق قرب الجسر القديم.", "Hello"]


def read_paragraphs() -> list[str]:
    texts = [paragraph for path in DOCUMENTS for paragraph in path.read_text("utf-8").split("\n\n")]
    return [text for text in texts if len(text) > 40][:60]


def embed_by_library(directory: Path, texts: list[str], prompt: str = "") -> Vectors:
    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    return np.asarray(model.encode(texts, prompt=prompt, normalize_embeddings=True, show_progress_bar=False), dtype=np.float32)


def embed(directory: Path, texts: list[str], role: EmbedRole = EmbedRole.PASSAGE, name: str = "/models/own") -> Vectors:
    return Embedder({name: directory}.__getitem__).embed(name, texts, role)


def test_minilm_gives_the_vectors_and_the_ranking_of_sentence_transformers(minilm: Embedder, minilm_directory: Path) -> None:
    paragraphs = read_paragraphs()
    assert len(paragraphs) > 20
    queries = ["How do I send a parcel?", "What may wheelchairs do?", "Which birds are seen in winter?", "maps", "When is the market open?"]
    passages, asked = minilm.embed(MINILM, paragraphs, EmbedRole.PASSAGE), minilm.embed(MINILM, queries, EmbedRole.QUERY)
    expected = embed_by_library(minilm_directory, [*paragraphs, *queries])
    assert np.abs(np.concatenate([passages, asked]) - expected).max() < TOLERANCE
    assert passages.dtype == np.float32
    ranks = np.argsort(-(asked @ passages.T), axis=1)[:, :10]
    library_ranks = np.argsort(-(expected[len(paragraphs) :] @ expected[: len(paragraphs)].T), axis=1)[:, :10]
    assert (ranks == library_ranks).all()


def test_vectors_do_not_depend_on_what_else_is_in_the_batch(minilm: Embedder) -> None:
    together = minilm.embed(MINILM, TEXTS, EmbedRole.PASSAGE)
    alone = np.concatenate([minilm.embed(MINILM, [text], EmbedRole.PASSAGE) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(np.linalg.norm(together, axis=1) - 1).max() < 1e-5


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_xlm_roberta_pools_as_its_own_files_say(tmp_path: Path, pooling: str) -> None:
    directory = build_tiny_xlm_roberta(tmp_path, pooling)
    assert np.abs(embed(directory, TEXTS) - embed_by_library(directory, TEXTS)).max() < TOLERANCE


def test_a_bare_transformer_takes_the_mean_and_never_more_than_its_positions(tmp_path: Path) -> None:
    directory = build_tiny_xlm_roberta(tmp_path, modules=False)
    long = ["a b c d e f g h " * 100]
    assert embed(directory, long).shape == (1, 32)
    assert Embedder({"x": directory}.__getitem__).load("x").tokenizer.max_tokens == 64


def test_bert_is_read_like_sentence_transformers_reads_it(tmp_path: Path) -> None:
    directory = build_tiny_embedding_model(tmp_path)
    assert np.abs(embed(directory, TEXTS) - embed_by_library(directory, TEXTS)).max() < TOLERANCE


def test_the_catalogue_decides_pooling_and_prefixes_of_its_models(tmp_path: Path) -> None:
    mean = build_tiny_xlm_roberta(tmp_path / "mean", "mean")
    cls = shutil.copytree(mean, tmp_path / "cls")
    write_modules(cls, ["Transformer", "Pooling", "Normalize"], {"pooling_mode_cls_token": True})
    assert np.abs(embed_by_library(mean, TEXTS) - embed_by_library(cls, TEXTS)).max() > FAR
    e5 = "intfloat/multilingual-e5-base"
    assert np.abs(embed(mean, TEXTS, EmbedRole.QUERY, e5) - embed_by_library(mean, TEXTS, "query: ")).max() < TOLERANCE
    assert np.abs(embed(mean, TEXTS, EmbedRole.PASSAGE, e5) - embed_by_library(mean, TEXTS, "passage: ")).max() < TOLERANCE
    assert np.abs(embed(mean, TEXTS, name="BAAI/bge-m3") - embed_by_library(cls, TEXTS)).max() < TOLERANCE
    english = "BAAI/bge-base-en-v1.5"
    assert np.abs(embed(cls, TEXTS, EmbedRole.PASSAGE, english) - embed_by_library(cls, TEXTS)).max() < TOLERANCE
    assert np.abs(embed(cls, ["maps"], EmbedRole.QUERY, english) - embed_by_library(cls, ["maps"])).max() > FAR


def test_arabic_families_prepare_their_texts(tmp_path: Path) -> None:
    directory = build_tiny_xlm_roberta(tmp_path)
    texts = ["الخَرائِطُ في بَيـــتٍ", "الخرائط في بيت"]
    as_they_are = embed(directory, texts)
    assert np.abs(as_they_are[0] - as_they_are[1]).max() > FAR
    for name in ("aubmindlab/bert-base-arabertv02", "CAMeL-Lab/bert-base-arabic-camelbert-msa"):
        with_marks, without = embed(directory, texts, name=name)
        assert np.abs(with_marks - without).max() < 1e-6


def test_prompts_of_an_own_model_are_used_by_role(tmp_path: Path) -> None:
    directory = build_tiny_xlm_roberta(tmp_path)
    prompts = {"prompts": {"query": "maps: ", "document": "bridge: "}, "default_prompt_name": None}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert np.abs(embed(directory, TEXTS, EmbedRole.QUERY) - embed_by_library(directory, TEXTS, "maps: ")).max() < TOLERANCE
    assert np.abs(embed(directory, TEXTS, EmbedRole.PASSAGE) - embed_by_library(directory, TEXTS, "bridge: ")).max() < TOLERANCE


def test_modules_that_we_do_not_know_are_run_by_their_library(tmp_path: Path) -> None:
    directory = build_tiny_xlm_roberta(tmp_path)
    write_modules(directory, ["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dense(64, 16).save(str(directory / "2_Dense"))
    vectors = embed(directory, TEXTS)
    assert vectors.shape == (len(TEXTS), 16)
    assert np.abs(vectors - embed_by_library(directory, TEXTS)).max() < TOLERANCE


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = build_tiny_xlm_roberta(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FailedPrecondition) as refused:
        embed(directory, ["x"])
    assert refused.value.reason == "PICKLED_WEIGHTS"


def test_a_module_of_its_own_code_is_refused(tmp_path: Path) -> None:
    directory = build_tiny_xlm_roberta(tmp_path)
    modules = (directory / "modules.json").read_text().replace("sentence_transformers.models.Pooling", "custom_pooling.Pooling")
    (directory / "modules.json").write_text(modules)
    with pytest.raises(FailedPrecondition) as refused:
        embed(directory, ["x"])
    assert refused.value.reason == "REMOTE_CODE"


@pytest.mark.parametrize("broken", ["config.json", "modules.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_directory_is_unavailable_and_its_path_is_not_told(tmp_path: Path, broken: str) -> None:
    directory = build_tiny_xlm_roberta(tmp_path)
    (directory / broken).write_text("{")
    with pytest.raises(FailedPrecondition) as refused:
        embed(directory, ["x"])
    assert refused.value.reason == "EMBEDDING_MODEL_UNAVAILABLE"
    assert str(tmp_path) not in str(refused.value)


def test_arabert_that_needs_farasa_is_refused_before_anything_is_loaded() -> None:
    embedder = Embedder(dict[str, Path]().__getitem__)
    with pytest.raises(FailedPrecondition) as refused:
        embedder.embed("aubmindlab/bert-base-arabertv2", ["x"], EmbedRole.PASSAGE)
    assert refused.value.reason == "EMBEDDING_MODEL_UNSUPPORTED"


def test_a_model_is_loaded_once_however_it_is_called_and_the_oldest_is_dropped(tmp_path: Path) -> None:
    directory = build_tiny_xlm_roberta(tmp_path)
    asked: list[str] = []

    def resolve(name: str) -> Path:
        asked.append(name)
        return directory

    embedder = Embedder(resolve, Shelf(2 * measure_weights(directory)))
    threads = [threading.Thread(target=embedder.load, args=(name,)) for name in ("bge-m3", "BAAI/bge-m3", "BGE-M3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == ["BAAI/bge-m3"]
    for name in ("b", "bge-m3", "c", "bge-m3", "b"):
        embedder.load(name)
    assert asked == ["BAAI/bge-m3", "b", "c", "b"]
    assert [embedder.is_loaded(name) for name in ("bge-m3", "BAAI/bge-m3", "b", "c")] == [True, True, True, False]


@pytest.mark.parametrize("make", [build_tiny_xlm_roberta, build_tiny_embedding_model])
def test_tokens_are_counted_whole_and_what_is_beyond_the_length_is_cut_as_the_library_does(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    directory = make(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    loaded = Embedder({"x": directory}.__getitem__).load("x")
    texts = ["", "maps", "old bridge " * 200, "maps </s> [SEP]", "a " * 62, "a " * 63]
    ids, counts = loaded.tokenizer.encode(texts, EmbedRole.QUERY)
    assert counts == [len(tokenizer(text).input_ids) for text in texts]
    assert ids == [tokenizer(text, truncation=True, max_length=64).input_ids for text in texts]
    assert loaded.encode_counted(texts, EmbedRole.PASSAGE)[1] == counts


@pytest.mark.parametrize(("backend", "least", "most"), [(EmbeddingBackend.BFLOAT16, 0.999, 0.99999), (EmbeddingBackend.INT8, 0.99, 0.9999)])
def test_fewer_bits_give_nearly_the_vectors_of_32_and_the_same_ranking_and_all_are_held_apart(
    minilm: Embedder, backend: EmbeddingBackend, least: float, most: float
) -> None:
    passages, queries = read_paragraphs(), ["How do I send a parcel?", "What may wheelchairs do?", "When is the market open?"]
    fewer = minilm.load(MINILM, backend)
    assert fewer is minilm.load("all-MiniLM-L6-v2", backend)
    held = [minilm.load(MINILM, other) for other in EmbeddingBackend]
    assert len({id(one) for one in held}) == len({one.space.fingerprint for one in held}) == len(EmbeddingBackend)
    rough, asked = fewer.encode(passages, EmbedRole.PASSAGE), fewer.encode(queries, EmbedRole.QUERY)
    exact = minilm.embed(MINILM, passages, EmbedRole.PASSAGE)
    assert least < (rough * exact).sum(axis=1).min() < most
    assert rough.dtype == np.float32
    assert np.abs(np.linalg.norm(rough, axis=1) - 1).max() < 1e-5
    expected = minilm.embed(MINILM, queries, EmbedRole.QUERY) @ exact.T
    assert ((asked @ rough.T).argmax(axis=1) == expected.argmax(axis=1)).all()
    given = minilm.embed_texts(MINILM, passages, EmbedRole.PASSAGE, backend)
    assert np.abs(np.array(given.vectors) - rough).max() < 1e-6
    assert given.fingerprint == fewer.space.fingerprint


def test_a_library_run_model_computes_in_sixteen_bits_too(tmp_path: Path) -> None:
    directory = build_tiny_xlm_roberta(tmp_path)
    write_modules(directory, ["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True})
    embedder = Embedder({"x": directory}.__getitem__)
    exact, *others = (embedder.embed_texts("x", TEXTS, EmbedRole.QUERY, backend).vectors for backend in EmbeddingBackend)
    assert [1e-6 < np.abs(np.array(exact) - np.array(rough)).max() < 0.05 for rough in others] == [True, True]


@pytest.mark.parametrize("make", [build_tiny_xlm_roberta, build_tiny_embedding_model])
def test_families_keep_their_vectors_in_eight_bits_alone_and_in_a_padded_batch(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    directory = make(tmp_path)
    loaded = Embedder({"x": directory}.__getitem__).load("x", EmbeddingBackend.INT8)
    together = loaded.encode(TEXTS, EmbedRole.PASSAGE)
    exact = embed(directory, TEXTS)
    assert (together * exact).sum(axis=1).min() > 0.98
    assert np.abs(together - exact).max() > 1e-5
    alone = np.concatenate([loaded.encode([text], EmbedRole.PASSAGE) for text in TEXTS])
    assert (together * alone).sum(axis=1).min() > 0.9999


def test_a_model_that_eight_bits_would_spoil_is_refused(tmp_path: Path) -> None:
    directory = build_tiny_embedding_model(tmp_path)
    weights = load_file(directory / "model.safetensors")
    # A weight so large that the others of its row are nothing beside it, for a state that is always about nothing.
    (wide,) = (name for name in weights if name.endswith("intermediate.dense.weight"))
    weights[wide][:, 0] = 1e4
    for part in ("weight", "bias"):
        (name,) = (name for name in weights if name.endswith(f"attention.output.LayerNorm.{part}"))
        weights[name][0] = 0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    embedder = Embedder({"x": directory}.__getitem__)
    embedder.load("x")
    with pytest.raises(FailedPrecondition, match=r"loses too much in INT8.*use FLOAT32") as refused:
        embedder.load("x", EmbeddingBackend.INT8)
    assert refused.value.reason == "EMBEDDING_BACKEND_UNSUPPORTED"


def test_eight_bits_are_refused_on_a_gpu_before_anything_is_loaded() -> None:
    with pytest.raises(FailedPrecondition, match=r"x cannot be computed in INT8 here.*Use FLOAT32") as refused:
        Embedder(dict[str, Path]().__getitem__, device="cuda").load("x", EmbeddingBackend.INT8)
    assert refused.value.reason == "EMBEDDING_BACKEND_UNSUPPORTED"


def test_a_large_model_embeds_fewer_texts_together(minilm: Embedder) -> None:
    loaded = minilm.load(MINILM)
    assert loaded.texts_per_window == 256
    assert LoadedModel(loaded.profile, loaded.tokenizer, Weighing(303_000_000), 8, "r").texts_per_window == 16


class Weighing:
    """An encoder of so many weights that encodes nothing."""

    def __init__(self, weight_count: int) -> None:
        self.weight_count = weight_count

    def encode_counted(self, texts: Sequence[str], role: EmbedRole) -> tuple[Vectors, list[int]]:
        """Give nothing."""
        raise NotImplementedError


def test_a_model_beyond_the_memory_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    directory = build_tiny_xlm_roberta(tmp_path)
    with pytest.raises(ResourceExhausted, match=r"m FLOAT32 takes 0 MiB of memory"):
        Embedder({"m": directory}.__getitem__, Shelf(measure_weights(directory) - 1)).embed("m", ["x"], EmbedRole.QUERY)


def test_no_texts_give_no_vectors_and_odd_ones_do_no_harm(minilm: Embedder) -> None:
    assert minilm.embed(MINILM, [], EmbedRole.QUERY).shape == (0, 384)
    odd = ["\x00", "\ud800", "a" * 100_000, "\u200b", "🙂" * 1_000]
    assert np.isfinite(minilm.embed(MINILM, odd, EmbedRole.QUERY)).all()
