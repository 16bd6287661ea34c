"""Kernels are compiled once, kept beside the code where it can be written to, and nowhere else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import server.inference.kernels as kernels

RUN = """
import torch
from server.inference.kernels.pointwise import Norm
from server.inference.kernels.team import find_team
row = torch.ones(1, 8, dtype=torch.bfloat16)
print(float(Norm(find_team(), row[0], 1e-5).normalize(row)[1].sum()))
"""


def run(directory: Path, preparation: str = "") -> str:
    """Norm a row in a process that knows only this copy of the code."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    home = directory / "home"
    home.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(directory)!r})\n{preparation}{RUN}"],
        env=environment | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not list(home.iterdir())
    return result.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory with a copy of the package `server.inference.kernels` and nothing else of the server."""
    source = Path(kernels.__file__).parent
    target = tmp_path / "server" / "inference" / "kernels"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    for package in (target.parent, target.parent.parent):
        (package / "__init__.py").touch()
    return tmp_path


def list_compiled(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*.nb?")}


def test_machine_code_is_kept_beside_the_code_and_made_anew_when_any_of_its_files_changes(copy: Path) -> None:
    assert run(copy) == "8.0"
    first = list_compiled(copy)
    assert first
    assert run(copy) == "8.0"
    assert list_compiled(copy) == first
    memory = copy / "server" / "inference" / "kernels" / "products.py"
    memory.write_text(memory.read_text() + "\n# changed\n")
    assert run(copy) == "8.0"
    assert list_compiled(copy) > first


def test_nothing_is_kept_where_the_code_cannot_be_written_to(copy: Path) -> None:
    # Root, as whom tests may run, can write everywhere: so the answer of the system is what is changed.
    assert run(copy, "import os\nos.access = lambda *_: False\n") == "8.0"
    assert not list_compiled(copy)
