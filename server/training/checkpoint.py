"""Checkpoints that a job goes on from exactly: adapter, optimiser, random state and position, as safetensors and JSON, never pickled."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from server.storage.artefacts import Artefact, ArtefactInvalid, ArtefactStore, Described

STATE_NAME = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
# Weights, two moments, and room for the file system.
SPACE_FACTOR = 3.2


@dataclass(slots=True)
class Position:
    """Where a job stands after `step` optimiser steps. With the seed it says everything about data order and learning rate."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    loss: float | None = None  # of the last step that had one
    skipped_in_a_row: int = 0
    evaluated_step: int = -1
    start_loss: float | None = None  # the evaluation before the first step
    best_loss: float | None = None  # of the evaluations after it
    best_step: int = 0
    patience_loss: float | None = None  # what an evaluation must fall below to be an improvement
    evaluations_without_improvement: int = 0


def save_checkpoint(
    store: ArtefactStore, path: str, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, position: Position, job: str
) -> Artefact:
    """Write a checkpoint. `job` names what is trained; only the same may go on from it. Raises DiskFull."""
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state = optimiser.state[parameter]
        tensors.update({f"{moment}/{name}": state[moment] for moment in MOMENTS if moment in state})
        if "step" in state:
            tensors[f"step/{name}"] = state["step"].reshape(1)
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    store.require_space(int(SPACE_FACTOR * sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("parameter/"))))

    def fill(directory: Path) -> Mapping[str, Described]:
        save_file(tensors, directory / STATE_NAME)
        return {"kind": "checkpoint", "job": job, **{name: value for name, value in asdict(position).items() if value is not None}}

    return store.write(path, fill)


def load_checkpoint(
    store: ArtefactStore, path: str, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, job: str
) -> Position:
    """Restore everything and give the position. Raises ArtefactInvalid when it is damaged or another job's; then nothing is changed."""
    artefact = store.open(path)
    described = dict(artefact.description)
    if described.pop("kind", None) != "checkpoint" or described.pop("job", None) != job:
        raise ArtefactInvalid("The checkpoint belongs to something else than this job.")
    tensors = load_file(artefact.directory / STATE_NAME)
    names = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if names != set(parameters) or any(tensors[f"parameter/{name}"].shape != parameters[name].shape for name in names):
        raise ArtefactInvalid("The checkpoint's tensors are not those of this job.")
    position = Position(**described)  # type: ignore[arg-type]  # the manifest is sealed and was written from a Position
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            if f"step/{name}" in tensors:
                moments = {moment: tensors[f"{moment}/{name}"].to(parameter.device) for moment in MOMENTS}
                optimiser.state[parameter] = {"step": tensors[f"step/{name}"].reshape(()), **moments}
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return position
