"""The shelf of loaded models: its budget of bytes, and one load at a time."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server.domain.errors import ResourceExhausted
from server.rag.shelf import NumberBytes, Shelf, measure_weights

NUMBERS = 1_000


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(NUMBERS // 2, dtype=torch.float16), "b": torch.zeros(5, NUMBERS // 10)}, tmp_path / "model.safetensors")
    return tmp_path


def test_weights_are_measured_as_float32_whatever_they_are_stored_as(weights: Path) -> None:
    assert measure_weights(weights) == 4 * NUMBERS
    (weights / "more.safetensors").write_text("{")
    assert measure_weights(weights) == 4 * NUMBERS
    (weights / "empty.safetensors").write_text("")
    assert measure_weights(weights) == 4 * NUMBERS


def test_matrices_of_bytes_count_a_byte_and_tables_of_words_do_not(tmp_path: Path) -> None:
    shapes = {"a.weight": (4, 25), "a.bias": (4,), "embeddings.word_embeddings.weight": (10, 5)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    bytes_held = measure_weights(tmp_path, NumberBytes(1, 4))
    assert bytes_held == 100 + 4 * 4 + 4 * 50
    shelf = Shelf(bytes_held)
    assert shelf.take(list, "a", lambda: tmp_path, lambda _: [1], NumberBytes(1, 4)) == [1]
    with pytest.raises(ResourceExhausted):
        shelf.take(list, "b", lambda: tmp_path, lambda _: [1])


def test_the_model_not_used_for_longest_leaves_and_kinds_share_the_budget(weights: Path) -> None:
    loads: list[str] = []

    def take(kind: type[object], name: str) -> None:
        def load(_: Path) -> object:
            loads.append(name)
            return kind()

        assert type(shelf.take(kind, name, lambda: weights, load)) is kind

    shelf = Shelf(2 * 4 * NUMBERS)
    for kind, name in [(set, "a"), (list, "a"), (set, "a"), (set, "b"), (set, "a"), (list, "a")]:
        take(kind, name)
    assert loads == ["a", "a", "b", "a"]


def test_what_fits_never_is_refused_and_drops_nothing(weights: Path) -> None:
    shelf = Shelf(4 * NUMBERS)
    shelf.take(list, "a", lambda: weights, lambda _: [1])
    save_file({"a": torch.zeros(1)}, weights / "more.safetensors")
    with pytest.raises(ResourceExhausted, match="b takes"):
        shelf.take(list, "b", lambda: weights, lambda _: pytest.fail("it was loaded"))
    assert shelf.take(list, "a", lambda: weights, lambda _: pytest.fail("it was dropped")) == [1]


def test_a_model_that_many_want_is_loaded_once(weights: Path) -> None:
    shelf, loads, gate = Shelf(1 << 20), list[int](), threading.Event()

    def load(_: Path) -> list[int]:
        gate.wait(10)
        loads.append(1)
        return [1]

    threads = [threading.Thread(target=shelf.take, args=(list, "a", lambda: weights, load)) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert loads == [1]
