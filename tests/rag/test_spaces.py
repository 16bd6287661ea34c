"""A space is named by all that decides about vectors: another weight or prefix gives another fingerprint, another disk does not."""

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from server.diskfiles import hash_file
from server.domain.rag_indexes import EmbeddingSpace
from server.rag import spaces
from server.rag.profiles import read_profile
from server.rag.spaces import describe_space, read_revision
from tests.rag.tiny_encoders import build_tiny_xlm_roberta

SPACE = EmbeddingSpace("org/e", "a" * 40, "MEAN", "query: ", "", "NONE", 512, 384, "torch-float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no test changes."""
    return build_tiny_xlm_roberta(tmp_path_factory.mktemp("spaces") / "tiny")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names: list[str] = []

    def note(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(spaces, "hash_file", note)
    return names


def test_each_field_of_a_space_tells_it_apart() -> None:
    changes: list[dict[str, Any]] = [
        {field.name: 7 if isinstance(getattr(SPACE, field.name), int) else "other"} for field in fields(EmbeddingSpace)
    ]
    others = [replace(SPACE, **change) for change in changes]
    assert len({space.fingerprint for space in [SPACE, *others]}) == 1 + len(others)
    assert replace(SPACE).fingerprint == SPACE.fingerprint
    assert len(SPACE.fingerprint) == 32


def test_a_copy_on_another_disk_gives_the_same_space(tiny: Path, copy: Path) -> None:
    made = [describe_space(read_profile("tiny", path), 32, read_revision(path)) for path in (tiny, copy)]
    assert made[0] == made[1]
    assert (made[0].pooling, made[0].max_tokens, made[0].dimension) == ("CLS", 64, 32)
    assert made[0].revision.startswith("sha256:")


def test_one_changed_weight_gives_another_revision(tiny: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[-1] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert read_revision(copy) != read_revision(tiny)


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_another_tokenizer_or_pooling_gives_another_revision(tiny: Path, copy: Path, name: str) -> None:
    settings = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(settings | {"added": 1}))
    assert read_revision(copy) != read_revision(tiny)


def test_what_vectors_do_not_depend_on_changes_nothing(tiny: Path, copy: Path) -> None:
    (copy / "README.md").write_text("Another one.")
    assert read_revision(copy) == read_revision(tiny)


def test_a_snapshot_of_the_hub_is_named_by_its_commit(copy: Path, tmp_path: Path, hashed: list[str]) -> None:
    snapshot = tmp_path / "models--org--e" / "snapshots" / ("c" * 40)
    snapshot.parent.mkdir(parents=True)
    copy.rename(snapshot)
    assert read_revision(snapshot) == "c" * 40
    assert hashed == []


def test_only_what_changed_is_hashed_again(copy: Path, tmp_path: Path, hashed: list[str]) -> None:
    cache = tmp_path / "hashes"
    first = read_revision(copy, cache)
    assert "model.safetensors" in hashed
    hashed.clear()
    assert read_revision(copy, cache) == first
    assert hashed == []
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert read_revision(copy, cache) != first
    assert hashed == ["config.json"]
    hashed.clear()
    # As many bytes as before, but written later.
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(copy / "model.safetensors", (1, 1))
    read_revision(copy, cache)
    assert hashed == ["model.safetensors"]


def test_a_cache_that_is_damaged_or_cannot_be_written_is_done_without(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hashes"
    first = read_revision(copy, cache)
    for kept in cache.iterdir():
        kept.write_text('{"model.safetensors": [1]}')
    assert read_revision(copy, cache) == first
    (tmp_path / "file").write_text("")
    assert read_revision(copy, tmp_path / "file") == first
