"""The checkpoints of one attempt at a job: where each is written, which one holds the best weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from server.domain.events import CheckpointSaved, ChildEvent, Warned
from server.domain.orders import FineTuneOrder
from server.storage.artefacts import ArtefactInvalid, ArtefactStore
from server.training.checkpoint import Position, load_checkpoint, save_checkpoint
from server.training.techniques.trained import Trained


@dataclass(slots=True)
class Checkpoints:
    """Writes and restores what is trained. `job` names it: a checkpoint of anything else is refused."""

    order: FineTuneOrder
    store: ArtefactStore
    trained: Trained
    optimiser: torch.optim.Optimizer
    job: str
    emit: Callable[[ChildEvent], None]
    best_path: str | None = None

    def save(self, position: Position, best: bool) -> None:
        """Write a checkpoint; `best` has it kept beside the latest. Raises DiskFull."""
        path = f"{self.order.job_path}/checkpoint-{position.step}-{self.order.lease_epoch}"
        saved = save_checkpoint(self.store, path, self.trained, self.optimiser, position, self.job)
        if best:
            self.best_path = path
        self.emit(CheckpointSaved(position.step, path, saved.size_bytes, best))

    def restore(self) -> Position:
        """Go on from where the order says; from the start without a checkpoint. Raises ArtefactInvalid."""
        self.best_path = self.order.best_checkpoint_path
        if self.order.checkpoint_path is None:
            return Position()
        return self._load(self.order.checkpoint_path)

    def restore_best(self, position: Position) -> int:
        """Load the weights of the best evaluation, if they are not the last ones; give the step whose weights these are.

        Where they cannot be read the last ones stay, and the job's owner is told: hours of training are not thrown away for it.
        """
        if position.best_loss is None or position.best_step == position.step:
            return position.step
        try:
            if self.best_path is None or self.store.open(self.best_path).description.get("step") != position.best_step:
                raise ArtefactInvalid("It is not there.")
            return self._load(self.best_path).step
        except ArtefactInvalid as error:
            told = f"The checkpoint of step {position.best_step}, the best, cannot be read: {error} The last weights are taken."
            self.emit(Warned("BEST_CHECKPOINT_LOST", told))
            return position.step

    def _load(self, path: str) -> Position:
        return load_checkpoint(self.store, path, self.trained, self.optimiser, self.job)
