"""The memory that the estimate expects is what whole jobs on a real model take, technique by technique, within a quarter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.domain.techniques import FullTechnique, Ia3, LoraTechnique, PrefixTuning, QloraTechnique, Technique
from server.environment import TORCH_ENVIRONMENT
from tests.training.one_job import TECHNIQUE

CACHE = Path(__file__).parents[2] / ".data" / "cache"


@pytest.mark.parametrize(
    "technique", [LoraTechnique(), QloraTechnique(), FullTechnique(), Ia3(), PrefixTuning()], ids=lambda each: each.kind
)
def test_the_peak_is_within_a_quarter_of_the_estimate(technique: Technique) -> None:
    command = [sys.executable, "-m", "tests.training.one_job", TECHNIQUE.encode(technique).decode(), str(CACHE)]
    environment = {**TORCH_ENVIRONMENT, **os.environ}  # as a worker's child has it
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["expected"] == pytest.approx(found["peak"], rel=0.25), found
