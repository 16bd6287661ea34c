"""Reads a Dockerfile into instructions, as far as the tests need: no escapes but line continuation, no here-documents."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "deployment" / "docker" / "Dockerfile.model_training"


@dataclass(frozen=True)
class Instruction:
    """One instruction of the final stage or an earlier one (`stage` from 0)."""

    stage: int
    word: str
    text: str

    @property
    def arguments(self) -> list[str]:
        """Its arguments, written as JSON or as words."""
        if self.text.startswith("["):
            return [str(argument) for argument in json.loads(self.text)]
        return shlex.split(self.text)


def read_instructions(path: Path = DOCKERFILE) -> list[Instruction]:
    """Read all instructions in order."""
    return list(_parse(path.read_text(encoding="utf-8")))


def _parse(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stage = -1
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        stage += word == "FROM"
        yield Instruction(stage, word, rest.strip())


def final_stage() -> list[Instruction]:
    """Give the instructions of the image that is run."""
    instructions = read_instructions()
    return [instruction for instruction in instructions if instruction.stage == instructions[-1].stage]


def copied_from_repository() -> list[tuple[str, str]]:
    """Give (source in the repository, destination in the image) of every copy of the image that is run."""
    copies = [instruction.arguments for instruction in final_stage() if instruction.word == "COPY"]
    return [(source, copy[-1]) for copy in copies if not copy[0].startswith("--from") for source in copy[:-1]]


def image_environment() -> dict[str, str]:
    """Give the environment variables that the image sets."""
    pairs = [pair for instruction in final_stage() if instruction.word == "ENV" for pair in instruction.arguments]
    return dict(pair.split("=", 1) for pair in pairs)
