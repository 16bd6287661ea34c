"""The normalisation layers alone (Zhao et al. 2024)."""

from pathlib import Path

from peft import LNTuningConfig
from transformers import PreTrainedModel

from server.training.techniques.masters import MasterWeights
from server.training.techniques.targets import add_adapter, list_norms
from server.training.techniques.trained import Trained, find_trainable, load_adapter_weights


class LayerNormTrained(Trained):
    """Copies of the layers, in the model's type, with float32 masters."""

    def __init__(self, model: PreTrainedModel) -> None:
        adapted = add_adapter(model, LNTuningConfig(target_modules=list_norms(model), task_type="CAUSAL_LM"))
        self._masters = MasterWeights(find_trainable(adapted))
        super().__init__(adapted, self._masters.parameters)

    def after_step(self, step: int) -> None:
        """Let the model compute with the new weights."""
        self._masters.to_model()

    def refresh(self) -> None:
        """Let the model compute with the restored weights."""
        self._masters.to_model()

    def warm_start(self, directory: Path) -> None:
        """Take the weights of a result of the same technique and shape. Raises JobFailure(BASE_MODEL_UNAVAILABLE) for another."""
        load_adapter_weights(self.peft, directory)
        self._masters.from_model()
