"""Learned vectors around random projections that all layers share (Kopiczko et al. 2024)."""

from peft import VeraConfig
from transformers import PreTrainedModel

from server.domain.techniques import ALL_LINEAR, Vera
from server.training.techniques.targets import add_adapter
from server.training.techniques.trained import Trained


def train_vera(model: PreTrainedModel, technique: Vera, seed: int) -> Trained:
    """Project by matrices drawn from `seed`, which go into the result."""
    config = VeraConfig(r=technique.rank, target_modules=ALL_LINEAR, projection_prng_key=seed, save_projection=True, task_type="CAUSAL_LM")
    return Trained(add_adapter(model, config))
