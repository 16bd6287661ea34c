"""Checkpoints that a job goes on from exactly: what is trained, the technique's own state, optimiser, random state and position.

Safetensors and JSON, never pickled.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from server.storage.artefacts import Artefact, ArtefactInvalid, ArtefactStore, Described
from server.training.optimiser import read_master, write_master
from server.training.techniques.trained import Trained

STATE_NAME = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
# Of the tensors' own size: room for the file system.
SPACE_FACTOR = 1.05


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
    store: ArtefactStore, path: str, trained: Trained, optimiser: torch.optim.Optimizer, position: Position, job: str
) -> Artefact:
    """Write a checkpoint. `job` names what is trained; only the same may go on from it. Raises DiskFull."""
    tensors: dict[str, torch.Tensor] = {f"state/{name}": tensor for name, tensor in trained.state().items()}
    for name, parameter in trained.parameters.items():
        tensors[f"parameter/{name}"] = read_master(optimiser, parameter)
        state = optimiser.state[parameter]
        tensors.update({f"{moment}/{name}": state[moment] for moment in MOMENTS if moment in state})
        if "step" in state:
            tensors[f"step/{name}"] = state["step"].reshape(1)
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    store.require_space(int(SPACE_FACTOR * sum(tensor.nbytes for tensor in tensors.values())))

    def fill(directory: Path) -> Mapping[str, Described]:
        save_file(tensors, directory / STATE_NAME)
        return {"kind": "checkpoint", "job": job, **{name: value for name, value in asdict(position).items() if value is not None}}

    return store.write(path, fill)


def load_checkpoint(store: ArtefactStore, path: str, trained: Trained, optimiser: torch.optim.Optimizer, job: str) -> Position:
    """Restore everything and give the position. Raises ArtefactInvalid when it is damaged or another job's; then nothing is changed."""
    artefact = store.open(path)
    described = dict(artefact.description)
    if described.pop("kind", None) != "checkpoint" or described.pop("job", None) != job:
        raise ArtefactInvalid("The checkpoint belongs to something else than this job.")
    position = Position(**described)  # type: ignore[arg-type]  # the manifest is sealed and was written from a Position
    with safe_open(artefact.directory / STATE_NAME, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        _check_fits(file, names, trained)
        for name, parameter in trained.parameters.items():
            if f"step/{name}" in names:
                moments = {moment: file.get_tensor(f"{moment}/{name}").to(parameter.device) for moment in MOMENTS}
                optimiser.state[parameter] = {"step": file.get_tensor(f"step/{name}").reshape(()), **moments}
            write_master(optimiser, parameter, file.get_tensor(f"parameter/{name}").to(parameter.device))
        trained.load_state({name.removeprefix("state/"): file.get_tensor(name) for name in sorted(names) if name.startswith("state/")})
        torch.set_rng_state(file.get_tensor("random/cpu"))
        if "random/cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("random/cuda"))
    return position


def _check_fits(file: Any, names: set[str], trained: Trained) -> None:
    """Compare names and shapes, before anything is changed."""
    expected = {f"parameter/{name}": tuple(parameter.shape) for name, parameter in trained.parameters.items()}
    found = {name: tuple(file.get_slice(name).get_shape()) for name in names if name.startswith("parameter/")}
    state = {name.removeprefix("state/") for name in names if name.startswith("state/")}
    if found != expected or not trained.fits_state(state):
        raise ArtefactInvalid("The checkpoint's tensors are not those of this job.")
