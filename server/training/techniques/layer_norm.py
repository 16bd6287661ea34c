"""The normalisation layers alone (Zhao et al. 2024)."""

from peft import LNTuningConfig
from transformers import PreTrainedModel

from server.training.techniques.targets import add_adapter, list_norms
from server.training.techniques.trained import Trained


class LayerNormTrained(Trained):
    """Copies of the layers, in the model's type."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(add_adapter(model, LNTuningConfig(target_modules=list_norms(model), task_type="CAUSAL_LM")))
